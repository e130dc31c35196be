"""The ``symmetric`` transport trains as one process does: without GPUs, in processes with the interpreter on."""

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [
        (2, "accumulate swiglu_every_loss spilling_half_frozen compiled_experts"),
        (2, "compiled_frozen_twice twice spilling_growing self_taught"),
        (3, "half_frozen copies_edits_before_backward spilling_checkpointed compiled_twice"),
    ],
)
def test_weights_are_those_of_one_process(num_ranks: int, cases: str) -> None:
    run_interpreted("tests.strategy.symmetric_on_cpu", str(num_ranks), *cases.split())
