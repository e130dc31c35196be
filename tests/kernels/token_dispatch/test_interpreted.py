"""The token dispatch kernels in the interpreter, in processes of their own."""

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "groups",
    [
        "plan split",
        pytest.param("too_few_rows copies many_ranks end_to_end barrier", marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_in_the_interpreter(groups: str) -> None:
    run_interpreted("tests.kernels.token_dispatch.interpreted", *groups.split())
