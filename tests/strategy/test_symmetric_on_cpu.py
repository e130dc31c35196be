"""The ``symmetric`` transport trains as one process does: without GPUs, in processes with the interpreter on."""

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [
        (2, "plain accumulate swiglu_every_loss half_frozen"),
        (2, "checkpointed twice growing self_taught"),
        (3, "plain copies_edits_before_backward"),
    ],
)
def test_weights_are_those_of_one_process(num_ranks: int, cases: str) -> None:
    run_interpreted("tests.strategy.symmetric_on_cpu", str(num_ranks), *cases.split())
