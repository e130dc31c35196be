"""Every Triton kernel that the interpreter can run, in fp32, in processes with the interpreter on."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


GROUPS = (
    "routing rows router losses shards narrow_gelu",
    "activations expert_mlp frozen",
    "row_layout rows_mlp partials no_tokens",
)


@pytest.mark.parametrize("groups", GROUPS)
def test_kernels_in_the_interpreter(groups: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted", *groups.split()],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
