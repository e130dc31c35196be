"""A signal on any rank ends all of them at the end of a step, with a checkpoint, and the fit goes on from there."""

import os
import signal
import stat
from pathlib import Path

import pytest
import torch

from tests.jobs import Job, largest_error, train, train_alone
from tests.processes import free_port, python
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 6
STEP = 2  # in which the signal comes

SCRIPT = """
import os, signal
import torch
torch.set_num_threads(1)
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_swiftmoe import SwiftMoEStrategy
from tests.jobs import Job, Net, data

class Signalled(Net):
    def train_dataloader(self):
        return data(self.job, self.global_rank, self.trainer.world_size)

    def training_step(self, batch, batch_idx):
        if batch_idx == {step} and self.global_rank == {rank}:
            {send}
        return super().training_step(batch, batch_idx)

class Slurm(SLURMEnvironment):
    # What Lightning starts by itself, with SLURM's wish to requeue.
    def __init__(self):
        super().__init__(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        theirs = LightningEnvironment()
        for name in ("world_size", "set_world_size", "global_rank", "set_global_rank", "local_rank", "node_rank"):
            setattr(self, name, getattr(theirs, name))
    creates_processes_externally = property(lambda self: "LOCAL_RANK" in os.environ)
    main_address = property(lambda self: "127.0.0.1")
    main_port = property(lambda self: int(os.environ.setdefault("MASTER_PORT", str({port}))))
    def validate_settings(self, num_devices, num_nodes):
        pass

if __name__ == "__main__":
    saves = ModelCheckpoint(
        "{folder}", "{{step}}", auto_insert_metric_name=False, save_top_k=-1, save_on_exception=True,
        every_n_train_steps={steps},
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices={devices}, max_steps={steps}, precision="64-true", logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir="{folder}", callbacks=[saves], plugins=[Slurm()] if {slurm} else [],
        strategy=SwiftMoEStrategy(slots_per_rank=5, timeout=30, start_method="{start}"),
    )
    trainer.fit(Signalled(Job(slots=5, steps={steps})))
"""

TO_ONE = "os.kill(os.getpid(), signal.{})"
TO_ALL = "os.killpg(os.getpgid(0), signal.{})"


@pytest.fixture(scope="module")
def expected():
    return train_alone(Job(slots=5, steps=STEPS))


def run(folder: Path, **fill: object) -> tuple[int, str]:
    """Exit code and output of a job."""
    options = {
        "folder": folder,
        "steps": STEPS,
        "step": STEP,
        "rank": 0,
        "send": "pass",
        "start": "popen",
        "devices": 2,
    }
    options |= {"slurm": False, "port": free_port()}
    script = folder / "job.py"
    script.write_text(SCRIPT.format(**{**options, **fill}))
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return python(script, cwd=folder, env={"PATH": path, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}, timeout_s=100)


def check_goes_on(path: Path, expected: dict[str, torch.Tensor], num_ranks: int = 2) -> None:
    """From the checkpoint to the weights of a fit that nothing stopped."""
    for weights in run_ranks(num_ranks, train, Job(slots=5, steps=STEPS, policy="proportional"), str(path)):
        assert largest_error(weights, expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "send", "rank", "start", "devices"),
    [
        ("SIGTERM", TO_ONE, 1, "popen", 2),
        pytest.param("SIGINT", TO_ALL, 0, "popen", 2, marks=pytest.mark.exhaustive),
        ("SIGTERM", TO_ALL, 1, "fork", 2),
        pytest.param("SIGTERM", TO_ONE, 0, "popen", 1, marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: str(value).split("(")[0].replace("os.", ""),
)
def test_a_signal_ends_all_ranks_with_a_checkpoint(tmp_path, expected, name, send, rank, start, devices):
    code, output = run(tmp_path, send=send.format(name), rank=rank, start=start, devices=devices)
    assert code == 128 + getattr(signal, name), output
    assert "Traceback" not in output
    (saved,) = tmp_path.glob("*.ckpt")
    assert saved.name == f"{STEP + 1}.ckpt"
    check_goes_on(saved, expected, devices)


def test_a_job_that_slurm_requeues(tmp_path, expected):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    code, output = run(tmp_path, send=TO_ONE.format("SIGUSR1"), rank=1, slurm=True)
    assert code == 128 + signal.SIGUSR1, output
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == STEP + 1
    check_goes_on(tmp_path / "hpc_ckpt_1.ckpt", expected)


@pytest.mark.exhaustive
def test_a_second_interrupt_does_not_wait(tmp_path):
    twice = f"[{TO_ONE.format('SIGINT')} for _ in range(2)]"
    code, output = run(tmp_path, send=twice, rank=0)
    assert code not in (0, 128 + signal.SIGINT), output
    assert not list(tmp_path.glob("*.ckpt"))
