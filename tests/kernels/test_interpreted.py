"""Every Triton kernel that the interpreter can run, in fp32, in processes with the interpreter on."""

import pytest

from tests.interpreter import run_interpreted

pytest.importorskip("triton")


GROUPS = (
    "routing rows router losses shards narrow_gelu",
    pytest.param("activations expert_mlp frozen", marks=pytest.mark.exhaustive),
    "row_layout rows_mlp partials no_tokens",
)


@pytest.mark.parametrize("groups", GROUPS)
def test_kernels_in_the_interpreter(groups: str) -> None:
    run_interpreted("tests.kernels.interpreted", *groups.split())
