"""A rank that raises or dies ends the job on every rank, and its error is what is shown, last and in few lines."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

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


@pytest.mark.exhaustive
def test_a_watchdog_that_ends_a_process_leaves_the_first_cause(tmp_path):
    script = SCRIPT.format(rank=1, action=ACTIONS["raises"], start="popen").replace("if __name__", HANGS)
    output, code = run(tmp_path, script)
    assert code != 0
    lines = output.splitlines()
    assert "The job ended because of rank 1:" in lines[-30:], output
    assert lines[-1].startswith("ArithmeticError: the first cause"), output
    assert said_by_watchdog(lines) == 1


def test_a_watchdog_that_ends_a_process_tells_where_the_others_are(tmp_path):
    script = SCRIPT.format(rank=1, action="threading.Event().wait()  # a hang", start="fork")
    script = script.replace("if __name__", HANGS)
    output, code = run(tmp_path, script)
    assert code != 0
    lines = output.splitlines()
    told = lines[lines.index(IN_DIFFERENT_PLACES) + 1 :]
    waits = f"{tmp_path}/job.py:{line_of(script, 'threading.Event().wait()', last=True)}"
    assert told[0] == f"rank 0: {waits}, in training_step: threading.Event().wait()"
    hangs = f"{tmp_path}/job.py:{line_of(script, '# a hang')}"
    assert told[1] == f"rank 1: {hangs}, in training_step: threading.Event().wait()  # a hang"
    assert told[2].endswith("ExchangeError: " + next(line for line in lines if line.startswith("combine exchange")))
    assert said_by_watchdog(lines) == 1


def said_by_watchdog(lines):
    return sum(line.startswith("combine exchange of layer 'moes.0' on rank 0") for line in lines)


IN_DIFFERENT_PLACES = "The job ended by a timeout: ranks waited for each other in different places:"

# Rank 0 reads what all ranks hold a part of, while rank 1 waits for it at the head of the next step.
READS_ALONE = """
from datetime import timedelta

class Fails(Net):
    def setup(self, stage):
        # Not before: ranks that start slowly should find each other.
        self.trainer.strategy._timeout = timedelta(seconds={timeout})

    def on_train_batch_end(self, *_):
        if self.global_rank == 0:
            if {signals}:
                open("fifo", "w").close()
            self.moes[0].experts.up_proj.norm()

if __name__"""


def reads_alone(start, **fill):
    """The job."""
    script = SCRIPT.format(rank=0, action="pass", start=start)
    return script.replace("if __name__", READS_ALONE.format(**fill))


def check_places(lines, script, tmp_path):
    file = f"{tmp_path}/job.py"
    norm, fit = line_of(script, "up_proj.norm()"), line_of(script, "trainer.fit(")
    assert lines[0] == f"rank 0: {file}:{norm}, in on_train_batch_end: self.moes[0].experts.up_proj.norm()"
    assert lines[1].startswith(f"rank 1: at the head of a training step, from {file}:{fit}, in <module>: trainer.fit(")


@pytest.mark.parametrize("start", ["popen", "fork"])
def test_a_read_on_one_rank_alone(tmp_path, start):
    script = reads_alone(start, timeout=5, signals=False)
    output, code = run(tmp_path, script)
    assert code == 1, output
    lines = output.splitlines()
    told = lines[lines.index(IN_DIFFERENT_PLACES) + 1 :]
    check_places(told, script, tmp_path)
    assert "Timed out waiting 5000ms" in told[2]
    assert "put none behind is_global_zero" in told[3]
    assert len(told) == 4
    assert "because of rank" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("start", ["popen", "fork"])
def test_a_second_sigterm_ends_ranks_that_wait(tmp_path, start):
    script = reads_alone(start, timeout=600, signals=True)
    os.mkfifo(tmp_path / "fifo")

    def signals(process):
        (tmp_path / "fifo").read_text()  # rank 0 is there
        process.terminate()
        while process.poll() is None:
            # Those that follow within a second are the same one.
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            process.terminate()

    output, code = run(tmp_path, script, signals)
    assert code == 128 + signal.SIGTERM, output
    lines = output.splitlines()
    at = lines.index("SIGTERM came again, and ranks had not ended a step together. Where they were:")
    check_places(lines[at + 1 :], script, tmp_path)
    assert len(lines) == at + 3, output


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


def line_of(script, text, last=False):
    """Where it stands in what ``run`` makes of the script."""
    found = [number for number, line in enumerate(textwrap.dedent(script).splitlines(), start=1) if text in line]
    return found[-1 if last else 0]


def run(tmp_path, text, meanwhile=lambda process: None):
    """What a job says, and its exit code; ``meanwhile`` is called with its process."""
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
        meanwhile(process)
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - began < 75
    return output, process.returncode
