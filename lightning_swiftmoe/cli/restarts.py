"""``swiftmoe train restarts=N``: a run that loses a rank goes on from its newest checkpoint by itself.

This process trains nothing: it starts the run, in a process group of its own, and starts it again where it failed.
Under ``torchrun --max-restarts`` that is torchrun's business, and the run finds out that it goes on.
"""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_swiftmoe.cli import resume
from lightning_swiftmoe.rescue import rescued_ranks

_MISTAKE = 2  # exit code of a user's mistake, which no restart mends
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_COUNT = "TORCHELASTIC_RESTART_COUNT"
_MOST = "TORCHELASTIC_MAX_RESTARTS"
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def asked_for(argv: Sequence[str]) -> int:
    """``restarts=N`` in ``argv``; 0 where it says nothing.

    Raises:
        ValueError: no number of restarts.
    """
    named = [argument.partition("=")[2] for argument in argv if argument.startswith("restarts=")]
    if not named:
        return 0
    if not named[-1].isdecimal():
        raise ValueError(f"restarts must be a number from 0, got {named[-1]!r}")
    if {"-m", "--multirun"} & set(argv):
        raise ValueError("restarts are for one run: leave out restarts, or -m")
    return int(named[-1])


def supervise(argv: Sequence[str], restarts: int) -> int:
    """Run ``swiftmoe train`` with ``argv``, again up to ``restarts`` times where it fails; the last exit status."""
    folder = _folder(argv)
    words = [*_without(argv, "restarts", "hydra.run.dir"), f"hydra.run.dir={folder}"]
    for number in range(restarts + 1):
        status, is_told_to_end = _run(words)
        if status in (0, _MISTAKE) or is_told_to_end or number == restarts:
            return status
        words = [*gone_on(argv, folder), *fewer_ranks(folder)]
        forget_start(folder)
        saved = resume.saved_in(folder)
        where = f"from {saved[-1].name}" if saved else "from the start: nothing is saved yet"
        print(f"the run ended with exit code {status}: restart {number + 1} of {restarts}, {where}", file=sys.stderr)
    raise AssertionError("not reached")


def gone_on(argv: Sequence[str], folder: Path) -> list[str]:
    """Overrides with which the run that ``argv`` began in ``folder`` goes on; from the start if nothing is saved."""
    words = _without(argv, "restarts", "resume", "hydra.run.dir")
    if resume.saved_in(folder):
        return [*words, f"resume={folder}"]
    return [*words, f"hydra.run.dir={folder}"]


def fewer_ranks(folder: Path) -> list[str]:
    """The override for the ranks that were left, where they saved what they had: as many as share a batch evenly."""
    left = rescued_ranks(folder / resume.RESCUED)
    if left == 0:
        return []
    config = OmegaConf.load(folder / resume.CONFIG)
    if config.cluster.num_nodes > 1:
        return []
    devices = max(number for number in range(1, left + 1) if config.data.batch_size % number == 0)
    return [f"cluster.devices={devices}"]


def forget_start(folder: Path) -> None:
    """Let a run begin in ``folder`` where one failed before it saved anything."""
    if not resume.saved_in(folder):
        (folder / resume.CONFIG).unlink(missing_ok=True)


def restarted(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """``argv``; where torchrun starts a run once more, what lets it go on.

    Raises:
        ValueError: it has no folder that all starts share, or they would share a store of addresses.
    """
    if environment.get(_MOST, "0") == "0" or any(word.startswith("resume=") for word in argv):
        return list(argv)
    named = [word.partition("=")[2] for word in argv if word.startswith("hydra.run.dir=")]
    if not named:
        raise ValueError("torchrun restarts this run, which has a new folder each time: set hydra.run.dir=FOLDER")
    if environment.get(_OWN_STORE) != "1":
        raise ValueError(
            f"torchrun --max-restarts needs {_OWN_STORE}=1 in its environment: else ranks that start again find the "
            "addresses of those that are gone"
        )
    if environment.get(_COUNT, "0") == "0":
        return list(argv)
    folder = Path(named[-1]).absolute()
    if environment.get("RANK") == "0":
        forget_start(folder)
    return gone_on(argv, folder)


def _folder(argv: Sequence[str]) -> Path:
    """Of the run: as resumed, as given, or with the name that Hydra would have given."""
    for key in ("resume", "hydra.run.dir"):
        named = [word.partition("=")[2] for word in argv if word.startswith(f"{key}=")]
        if named and named[-1] not in ("", "null"):
            return Path(named[-1]).absolute()
    return Path(f"outputs/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}").absolute()


def _without(argv: Sequence[str], *keys: str) -> list[str]:
    return [word for word in argv if word.partition("=")[0] not in keys]


def _run(words: Sequence[str]) -> tuple[int, bool]:
    """Exit status of one run, with 128 and the number for a signal, and whether this process was told to end."""
    command = [sys.executable, "-m", "lightning_swiftmoe", "train", *words]
    process = subprocess.Popen(command, start_new_session=True)
    with _signals_passed_on(process) as told:
        status = process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # ranks that have lost the first one, and hold its devices
    return (status if status >= 0 else 128 - status), bool(told)


@contextmanager
def _signals_passed_on(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """The run ends by itself, at the end of a step. Gives the signals that came."""
    came: list[int] = []

    def pass_on(signum: int, _: Any) -> None:
        came.append(signum)
        process.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in _PASSED_ON}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
