"""A rank raises or is killed in mid-training: the others, and the job, end with an error within the timeout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gpu.cases import TRANSPORTS
from tests.gpu.rank_pool import DEVICE, NO_MULTICAST
from tests.processes import free_port

pytestmark = pytest.mark.gpu

TIMEOUT_S = 20  # of a collective
SLACK_S = 25  # to notice, to unwind and to tear CUDA down
PATIENCE_S = 110  # of this test

SCRIPT = """
import os, signal
import torch
torch.set_num_threads(1)
import lightning.pytorch as pl
from lightning_swiftmoe import SwiftMoEStrategy
from tests.gpu.cases import HOPPER, GpuJob
from tests.jobs import Net, data

class Fails(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == 1:
            {action}
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    job = GpuJob(width=64, moe=HOPPER, precision="bf16-mixed", steps=20)
    trainer = pl.Trainer(
        accelerator="{accelerator}", devices=2, max_steps=20, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=SwiftMoEStrategy(slots_per_rank=3, timeout={timeout}, transport="{transport}"),
    )
    trainer.fit(Fails(job), data(job, int(os.environ.get("LOCAL_RANK", 0)), 2))
"""
ACTIONS = {
    "raises": 'raise ArithmeticError("the first cause")',
    "dies": "os.kill(os.getpid(), signal.SIGKILL)",
}
# Lightning's launcher ends the others itself; without it each rank is on its own.
STARTS = ("launcher", "alone")
KINDS = [(start, action, transport) for start in STARTS for action in ACTIONS for transport in TRANSPORTS]


@dataclass
class Running:
    """Processes of one job and when they ended."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]
    ended: dict[int, float] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all have ended."""
        for number, process in enumerate(self.processes):
            if number not in self.ended and process.poll() is not None:
                self.ended[number] = time.monotonic()
        return len(self.ended) == len(self.processes)

    def kill(self) -> None:
        """End what still runs, with its children."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def output(self) -> str:
        """Of all processes, one after the other."""
        return "\n".join(log.read_text() for log in self.logs)


def start(folder: Path, kind: tuple[str, str, str]) -> Running:
    how, action, transport = kind
    folder = folder / "-".join(kind)
    folder.mkdir()
    script = folder / "job.py"
    accelerator = "gpu" if DEVICE == "cuda" else "cpu"
    script.write_text(
        SCRIPT.format(action=ACTIONS[action], accelerator=accelerator, transport=transport, timeout=TIMEOUT_S)
    )
    ranks = [{}] if how == "launcher" else [{"LOCAL_RANK": str(rank)} for rank in range(2)]
    # The port is free now, and every job has one of its own.
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    running = Running([], [])
    for number, rank in enumerate(ranks):
        log = folder / f"{number}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, **NO_MULTICAST, **address, **rank, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        running.processes.append(process)
        running.logs.append(log)
    return running


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Running]:
    """All jobs at once: each spends most of its time starting and waiting."""
    folder = tmp_path_factory.mktemp("failures")
    running = {kind: start(folder, kind) for kind in KINDS}
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline and not _all_ended(running.values()):
            time.sleep(0.2)
    finally:
        for job in running.values():
            job.kill()
    return running


def _all_ended(jobs: Iterable[Running]) -> bool:
    # Every one is asked, so that each has the time at which it ended.
    return min([job.poll() for job in jobs])


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.timeout(PATIENCE_S + 60)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_rank_ends_with_an_error(jobs, kind):
    job = jobs[kind]
    tail = job.output[-3000:]
    assert len(job.ended) == len(job.processes), f"still running after {PATIENCE_S} s:\n{tail}"
    assert all(process.returncode != 0 for process in job.processes), tail
    assert max(job.ended.values()) - min(job.ended.values()) < TIMEOUT_S + SLACK_S, tail
    lines = job.output.splitlines()
    if kind[1] == "raises":
        assert "ArithmeticError: the first cause" in job.output, tail
    if kind[0] == "alone":
        # Rank 0, which waited for the other.
        assert "exchange of layer 'moes." in job.logs[0].read_text(), tail
    if kind[0] == "launcher":
        assert "The job ended because of rank 1:" in lines[-30:], tail
        last = {"raises": "ArithmeticError: the first cause", "dies": "rank 1 was killed by SIGKILL"}[kind[1]]
        assert lines[-1].startswith(last), tail
