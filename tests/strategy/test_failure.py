"""A rank that raises or dies ends the job on every rank, and its error is what is shown, last and in few lines."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import lightning.pytorch as pl
from lightning_swiftmoe import SwiftMoEStrategy
from tests.jobs import Job, Net, data

class Fails(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == {rank}:
            {action}
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    job = Job(slots=3, precision="32-true")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, max_steps=5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        strategy=SwiftMoEStrategy(slots_per_rank=3, timeout=20, start_method="{start}"),
    )
    trainer.fit(Fails(job), data(job, int(os.environ.get("LOCAL_RANK", 0)), 2))
"""

# Rank 1 does as it is told and does not come to its end; rank 0 waits for its device, where no exception reaches, and
# its watchdog gives up on an exchange.
HANGS = """
import atexit, threading
from functools import partial
from lightning_swiftmoe.parallel.watchdog import Watchdog, end_process

class Never:
    def query(self):
        return False

class Fails(Fails):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            atexit.register(threading.Event().wait)
        if batch_idx == 2 and self.global_rank == 0:
            watchdog = Watchdog(4, 0, 2, partial(end_process, tell=self.trainer.strategy.on_hang))
            watchdog.start()
            watchdog.watch("combine", "moes.0", Never())
            threading.Event().wait()
        return super().training_step(batch, batch_idx)

if __name__"""

ACTIONS = {
    "raises": 'raise ArithmeticError("the first cause")',
    "dies": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("start", "action", "rank"),
    # Rank 0 of popen is the process the user started: it can raise, but not die and tell.
    [
        ("popen", "raises", 0),
        pytest.param("popen", "dies", 1, marks=pytest.mark.exhaustive),
        pytest.param("fork", "raises", 1, marks=pytest.mark.exhaustive),
        ("fork", "dies", 0),
    ],
)
def test_the_job_ends_with_the_first_cause(tmp_path, start, action, rank):
    output, code = run(tmp_path, SCRIPT.format(rank=rank, action=ACTIONS[action], start=start))
    assert code != 0
    lines = output.splitlines()
    assert f"The job ended because of rank {rank}:" in lines[-30:], output
    last = {"raises": "ArithmeticError: the first cause", "dies": f"rank {rank} was killed by SIGKILL"}[action]
    assert lines[-1].startswith(last)
    assert output.count("Traceback (most recent call last)") == (action == "raises"), output
    assert len(lines) < 60


@pytest.mark.parametrize(
    ("start", "action", "culprit", "last"),
    [
        pytest.param("popen", ACTIONS["raises"], 1, "ArithmeticError: the first cause", marks=pytest.mark.exhaustive),
        ("fork", "threading.Event().wait()", 0, "lightning_swiftmoe.parallel.communicator.ExchangeError: combine"),
    ],
    ids=["raises", "waits-forked"],
)
def test_a_watchdog_that_ends_a_process_leaves_the_first_cause(tmp_path, start, action, culprit, last):
    script = SCRIPT.format(rank=1, action=action, start=start).replace("if __name__", HANGS)
    output, code = run(tmp_path, script)
    assert code != 0
    lines = output.splitlines()
    assert f"The job ended because of rank {culprit}:" in lines[-30:], output
    assert lines[-1].startswith(last), output
    assert sum(line.startswith("combine exchange of layer 'moes.0' on rank 0") for line in lines) == 1


ORPHAN = """
import threading

class Fails(Fails):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            open("fifo", "w").close()
            threading.Event().wait()
        if batch_idx == 2 and self.global_rank == 0:
            open("fifo").read()  # rank 1 is there
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

if __name__"""


def test_a_rank_ends_when_the_process_that_started_it_is_gone(tmp_path):
    script = SCRIPT.format(rank=1, action="pass", start="popen").replace("if __name__", ORPHAN)
    os.mkfifo(tmp_path / "fifo")
    # Both write to one pipe, which the last of them closes.
    output, code = run(tmp_path, script)
    assert code == -signal.SIGKILL
    assert output.splitlines()[-1] == "the process that started this rank is gone: this one ends too"


def run(tmp_path, text):
    """What a job says, and its exit code."""
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(text))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - began < 75
    return output, process.returncode
