"""One rank of one system: ``python -m lightning_swiftmoe.cli._peers.worker FOLDER RANK``.

It loads what it needs, says so in ``loaded.rank<r>``, waits for its turn, trains, writes ``result.rank<r>.json`` and
leaves without tidying up.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException

from lightning_swiftmoe.cli._measured import write_whole
from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter, Result, barrier
from lightning_swiftmoe.cli._peers.systems import EXTRAS, PEERS

TURN = "turn.json"  # comes when the system before has left
POLL_S = 0.02
LOADING_S = 120.0  # packages take seconds


@dataclass(frozen=True)
class Turn:
    """What a system is told when its turn comes.

    Args:
        port: where its ranks meet; chosen now: one chosen at their start may be taken by now.
        others_loaded: files that come when the next system's processes have loaded their packages, and are idle.
    """

    port: int
    others_loaded: list[str]

    def give(self, folder: Path) -> None:
        """To the ranks whose folder this is."""
        write_whole(folder / TURN, asdict(self))


def forget_earlier_run(folder: Path) -> None:
    """What another run of the same name left would give turns that nobody has."""
    for pattern in (TURN, "loaded.rank*", "result.rank*", "error.rank*"):
        for path in folder.glob(pattern):
            path.unlink()


def loaded_file(folder: Path, rank: int) -> Path:
    """There when the rank has loaded its packages."""
    return folder / f"loaded.rank{rank}"


def main(folder: Path, rank: int) -> None:
    """Run the rank; never returns."""
    be_quiet()

    def done(result: Result) -> None:
        result.write(folder / f"result.rank{rank}.json")
        barrier()
        leave(0)

    try:
        try:
            job = Job.read(folder, rank)
            peer = load(job)
        finally:  # whoever failed keeps nobody waiting
            loaded_file(folder, rank).touch()
        turn = wait_for_turn(folder)
        os.environ["MASTER_PORT"] = str(turn.port)
        if job.device.type == "cuda":
            torch.cuda.set_device(job.device)
        else:
            torch.set_num_threads(1)
        peer.run(job, Meter(job, done, partial(wait_for_files, turn.others_loaded)))
        raise RuntimeError("training ended before its last step")
    except BaseException as error:
        traceback.print_exc()
        # Hydra wraps what a class says of its arguments.
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        (folder / f"error.rank{rank}.txt").write_text(f"{type(cause).__name__}: {cause}")
        leave(1)


def load(job: Job) -> Any:
    """The peer's module, with the packages that take seconds to import. The GPU is left alone."""
    os.environ["DS_ACCELERATOR"] = job.device.type
    package = EXTRAS.get(job.name)
    if package is not None:
        importlib.import_module(package)
    return importlib.import_module(f"lightning_swiftmoe.cli._peers.{PEERS[job.name]}")


def be_quiet() -> None:
    """What frameworks say on every start, and nobody needs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.simplefilter("ignore")


def wait_for_turn(folder: Path) -> Turn:
    """Leaves when nobody remains who could give it."""
    parent = os.getppid()
    while not (folder / TURN).exists():
        if os.getppid() != parent:
            leave(1)
        time.sleep(POLL_S)
    return Turn(**json.loads((folder / TURN).read_text()))


def wait_for_files(paths: Sequence[str], limit_s: float = LOADING_S) -> None:
    """Until all are there.

    Raises:
        RuntimeError: one is not, after ``limit_s``.
    """
    deadline = time.monotonic() + limit_s
    missing = list(paths)
    while missing:
        missing = [path for path in missing if not Path(path).exists()]
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"the next system's processes have not loaded their packages within {limit_s:.0f} s, and steps beside "
                f"that would be slower: see log.rank*.txt in {Path(missing[0]).parent}"
            )
        time.sleep(POLL_S)


def leave(status: int) -> None:
    """At once: tearing down process groups and frameworks can take long, or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
