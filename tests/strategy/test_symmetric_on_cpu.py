"""The ``symmetric`` transport trains as one process does: without GPUs, in processes with the interpreter on."""

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [
        (3, "spilling_half_frozen copies_edits_before_backward"),
        pytest.param(2, "swiglu_every_loss twice spilling_growing compiled_experts", marks=pytest.mark.exhaustive),
        pytest.param(2, "plain accumulate checkpointed compiled_twice", marks=pytest.mark.exhaustive),
        pytest.param(
            2, "compiled_frozen_twice self_taught in_eval_mode compiled_in_eval_mode", marks=pytest.mark.exhaustive
        ),
        pytest.param(3, "half_frozen spilling_checkpointed", marks=pytest.mark.exhaustive),
    ],
)
def test_weights_are_those_of_one_process(num_ranks: int, cases: str) -> None:
    run_interpreted("tests.strategy.symmetric_on_cpu", str(num_ranks), *cases.split())
