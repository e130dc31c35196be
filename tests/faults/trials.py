"""Ranks are killed anywhere, and nothing is lost: what a trial does and what it finds wrong."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lightning_swiftmoe.checkpoint.periodic import checkpoints_in
from lightning_swiftmoe.checkpoint.reading import read_checkpoint
from lightning_swiftmoe.redundancy import FOLDER, STEPS_TAKEN
from tests.faults.job import BEHIND_THE_VOTE, PHASES, Plan
from tests.gpu.rank_pool import NO_MULTICAST
from tests.jobs import largest_error, train_alone
from tests.processes import ROOT, free_port

LAUNCHERS = ("popen", "fork", "spawn", "torchrun")
TOLERANCE = 1e-12
TOLERANCE_OF_FP32 = 1e-5
PATIENCE_S = 90  # of one job: imports, training, and the timeout of an exchange


@dataclass(frozen=True)
class Trial:
    """One killed job and one that goes on.

    Args:
        plan: of the first.
        launcher: of both.
        num_ranks_after: ranks of the second.
    """

    plan: Plan
    launcher: str
    num_ranks_after: int

    @classmethod
    def of(
        cls,
        seed: int,
        folder: Path,
        launchers: tuple[str, ...] = LAUNCHERS,
        redundancy: int = 1,
        transport: str = "",
    ) -> Trial:
        """The trial of a seed.

        Args:
            seed: any number.
            folder: for the files.
            launchers: to choose from.
            redundancy: owners of every shard; with two the job saves no checkpoint before its end, and the other ranks
                go on.
            transport: between two ranks in fp32, see ``Plan``; empty: 2 to 4 ranks in fp64.
        """
        rng = random.Random(seed)
        launcher = rng.choice(launchers)
        num_ranks = rng.randint(2, 4)
        if transport:
            num_ranks = 2
        phase = rng.choice(PHASES)
        # Rank 0 saves; the counter of steps has moved on when it does.
        rank = 0 if phase == "saving" else rng.randrange(num_ranks)
        step = rng.choice([2, 4, 6]) if phase == "saving" else rng.randint(1, 7)
        plan = Plan(
            str(folder / "checkpoints"),
            num_ranks,
            "popen" if launcher == "torchrun" else launcher,
            killed=(rank, step, phase),
            delay_ms=rng.uniform(0, 30),
            transport=transport,
        )
        after = num_ranks if rng.random() < 0.5 else rng.randint(1, num_ranks if transport else 4)
        if redundancy == 1:
            return cls(plan, launcher, after)
        if phase == "saving":
            plan = replace(plan, killed=(rng.randrange(num_ranks), step, BEHIND_THE_VOTE))
        return cls(replace(plan, redundancy=redundancy, save_every=100), launcher, num_ranks - 1)


def expected_weights(transport: str = "") -> dict[str, torch.Tensor]:
    """Of one process without the strategy, on a host in fp64."""
    return train_alone(replace(Plan("", 1, "popen", transport=transport).job, precision="64-true"))


def faults_of(trial: Trial, expected: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """What was wrong; empty where nothing was lost."""
    faults = []
    code, seconds, output = run_job(trial.plan, trial.launcher, folder / "killed")
    if code is None:
        return [f"still running after {seconds:.0f} s: {output[-2000:]}"]
    if code == 0:
        faults.append("the killed job ended as if nothing had happened")
    saved = checkpoints_in(Path(trial.plan.folder))
    if trial.plan.redundancy > 1:
        faults += [] if not saved else ["a checkpoint was there before the kill"]
        saved = checkpoints_in(Path(trial.plan.folder) / FOLDER)
        faults += _not_rescued(trial.plan, saved, output)
    for path in Path(trial.plan.folder).glob("*.ckpt"):
        try:
            read_checkpoint(path)
        except Exception as error:
            faults.append(f"{path.name} has its final name, and {error}")
    goes_on = replace(
        trial.plan,
        killed=None,
        num_ranks=trial.num_ranks_after,
        resume=str(saved[-1]) if saved else None,
        expert_parallel_size=None,
    )
    code, seconds, output = run_job(goes_on, trial.launcher, folder / "resumed")
    if code != 0:
        return [*faults, f"going on ended with {code} after {seconds:.0f} s: {output[-2000:]}"]
    final = read_checkpoint(Path(trial.plan.folder) / f"step-{trial.plan.steps}.ckpt")["state_dict"]
    final = {name: value.double() for name, value in final.items()}
    error = largest_error(final, expected)
    # Not the other way around: an error that is NaN is wrong.
    if not error <= (TOLERANCE_OF_FP32 if trial.plan.transport else TOLERANCE):
        faults.append(f"weights are off by {error:.1e}")
    return faults


def _not_rescued(plan: Plan, saved: list[Path], output: str) -> list[str]:
    """What is wrong with what ranks that were left have saved: all steps before the one in which a rank was killed."""
    assert plan.killed is not None
    _, step, phase = plan.killed
    if not saved:
        return [f"ranks that were left have saved nothing: {output[-2000:]}"]
    # At a batch's end the counter has moved on; where nobody is behind that end yet, it is one step earlier.
    least = step - 1 if phase == "batch end" else step
    found = read_checkpoint(saved[-1])
    taken = found["global_step"] + found[STEPS_TAKEN]
    return [] if taken >= step and found["global_step"] >= least else [f"they have saved step {taken} of {step}"]


def run_job(plan: Plan, launcher: str, folder: Path) -> tuple[int | None, float, str]:
    """Exit code (None: it did not end), seconds and output of a job, all of whose processes have ended."""
    folder.mkdir(parents=True)
    on_gpus = NO_MULTICAST if plan.transport else {}
    file = folder / "plan.json"
    file.write_text(json.dumps(asdict(plan)))
    command = [sys.executable, "-m", "tests.faults.job", str(file)]
    if launcher == "torchrun":
        where = ["--nproc-per-node", str(plan.num_ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, *command[1:]]
    began = time.monotonic()
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **on_gpus, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
        )
        try:
            code: int | None = process.wait(PATIENCE_S)
            if _left_in_session(process.pid, PATIENCE_S - (time.monotonic() - began)):
                code = None
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_session(process.pid)
            process.wait()
        log.seek(0)
        return code, time.monotonic() - began, log.read()


def _left_in_session(leader: int, patience_s: float) -> bool:
    """Whether processes of the session are alive after so long: each is waited for by its file descriptor."""
    deadline = time.monotonic() + max(patience_s, 1)
    for pid in _session(leader):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        os.close(descriptor)
        if not ready:
            return True
    return False


def _session(leader: int) -> list[int]:
    """Processes of a session; zombies are over."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        state, session = fields[0], int(fields[3])
        if session == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _end_session(leader: int) -> None:
    for pid in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
