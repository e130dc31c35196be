"""A run of ``swiftmoe train restarts=N`` whose processes are killed by the clock."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.processes import ROOT

MARKS = "marks.txt"
KILLS = "kills.txt"
SETTINGS = "settings.json"
START_S = 300  # patience until the first step
END_S = 120  # patience from SIGTERM to the end


def preempt(folder: Path, minutes: float, every_s: float, every_n_steps: int, seed: int) -> None:
    """Train the quickstart recipe in ``folder`` and SIGKILL one of its processes again and again.

    Args:
        folder: new; gets ``marks.txt``, ``kills.txt`` (seconds of ``time.time``, process), ``settings.json``,
            ``log.txt`` and the run.
        minutes: from the first step until the run is told to end.
        every_s: seconds between kills, by the clock, whatever the run is doing then.
        every_n_steps: between checkpoints.
        seed: of who is killed: a rank, or the process that forked the ranks.

    Raises:
        RuntimeError: the run ended by itself, or did not end when it was told to.
    """
    folder.mkdir(parents=True)
    settings = {"every_s": every_s, "every_n_steps": every_n_steps, "seed": seed}
    (folder / SETTINGS).write_text(json.dumps(settings))
    rng = random.Random(seed)
    command = [sys.executable, "-m", "lightning_swiftmoe", "train", "recipes=quickstart", "restarts=1000"]
    command += ["trainer.max_steps=1000000", "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}/run"]
    command += [f"callbacks.checkpoint.every_n_steps={every_n_steps}", "callbacks.checkpoint.every_minutes=null"]
    command += ["+callbacks.marks._target_=tests.faults.marks.Marks", f"+callbacks.marks.file={folder / MARKS}"]
    with (folder / "log.txt").open("w") as log, (folder / KILLS).open("w", buffering=1) as kills:
        run = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        try:
            began = _first_step(run, folder / MARKS)
            number = 1
            while number * every_s < 60 * minutes:
                _wait_until(run, began + number * every_s)
                victim = rng.choice(_ranks(run))
                kills.write(f"{time.time():.6f} {victim.pid}\n")
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                number += 1
            _wait_until(run, began + 60 * minutes)
            ended = time.time()
            run.send_signal(signal.SIGTERM)
            run.wait(END_S)
        finally:
            for process in [*_ranks(run), psutil.Process(run.pid)] if run.poll() is None else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            run.wait()
    (folder / SETTINGS).write_text(json.dumps({**settings, "ended": ended}))


def _first_step(run: subprocess.Popen[bytes], marks: Path) -> float:
    """When the first step ended, in seconds of ``time.time``."""
    deadline = time.time() + START_S
    while time.time() < deadline:
        _wait_until(run, time.time() + 0.5)
        steps = [line for line in marks.read_text().splitlines() if line.startswith("step")] if marks.exists() else []
        if steps:
            return float(steps[0].split()[2])
    raise RuntimeError(f"no step after {START_S} s")


def _wait_until(run: subprocess.Popen[bytes], when: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        raise RuntimeError(f"the run ended by itself with {run.wait(max(when - time.time(), 0))}")


def _ranks(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes that train: below the one that starts them again, which is not killed."""
    return [process for process in psutil.Process(run.pid).children(recursive=True) if _trains(process)]


def _trains(process: psutil.Process) -> bool:
    try:
        return "train" in process.cmdline()
    except psutil.Error:
        return False
