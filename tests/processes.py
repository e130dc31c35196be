"""Programs started as users start them: in processes of their own, none of which outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(*args: object, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 120) -> tuple[int, str]:
    """Exit code of ``python *args``, and what it and its ranks said on either stream.

    Args:
        args: words of the command line.
        cwd: where it runs; its words go to ``log.txt`` there.
        env: what it has in its environment besides ours. ``tests`` is importable.
        timeout_s: after so long it is killed, and raises.
    """
    ours = {key: value for key, value in os.environ.items() if key != "COLUMNS"}  # as wide as without a terminal
    with (cwd / "log.txt").open("w+") as log:  # not a pipe: a rank that outlived its parent would keep it open
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env={**ours, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return code, log.read()


def swiftmoe(*args: object, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 120) -> tuple[int, str]:
    """``python -m lightning_swiftmoe *args``; see ``python``."""
    return python("-m", "lightning_swiftmoe", *args, cwd=cwd, env=env, timeout_s=timeout_s)
