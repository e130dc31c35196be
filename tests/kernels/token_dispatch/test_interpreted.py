"""The token dispatch kernels in the interpreter, in processes of their own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("groups", ["plan too_few_rows", "many_ranks end_to_end barrier"])
def test_kernels_in_the_interpreter(groups: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.token_dispatch.interpreted", *groups.split()],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
