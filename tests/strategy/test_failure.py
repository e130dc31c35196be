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

ACTIONS = {
    "raises": 'raise ArithmeticError("the first cause")',
    "dies": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("start", ["popen", "fork"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ACTIONS)
def test_the_job_ends_with_the_first_cause(tmp_path, start, rank, action):
    if action == "dies" and rank == 0 and start == "popen":
        pytest.skip("rank 0 is the process the user started")
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SCRIPT.format(rank=rank, action=ACTIONS[action], start=start)))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert time.monotonic() - began < 75
    lines = output.splitlines()
    assert f"The job ended because of rank {rank}:" in lines[-30:], output
    last = {"raises": "ArithmeticError: the first cause", "dies": f"rank {rank} was killed by SIGKILL"}[action]
    assert lines[-1].startswith(last)
    assert output.count("Traceback (most recent call last)") == (action == "raises"), output
    assert len(lines) < 60
