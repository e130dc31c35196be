"""One rank of one system: ``python -m lightning_swiftmoe.cli._peers.worker FOLDER RANK``.

It loads what it needs, waits for its turn, trains, writes ``result.rank<r>.json`` and leaves without tidying up.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException

from lightning_swiftmoe.cli._measured import write_whole
from lightning_swiftmoe.cli._peers.job import Job
from lightning_swiftmoe.cli._peers.meter import Meter, Result, barrier
from lightning_swiftmoe.cli._peers.systems import EXTRAS, PEERS

TURN = "turn"  # the file with the port, which comes when the system before has left
POLL_S = 0.02


def main(folder: Path, rank: int) -> None:
    """Run the rank; never returns."""
    be_quiet()

    def done(result: Result) -> None:
        result.write(folder / f"result.rank{rank}.json")
        barrier()
        leave(0)

    try:
        job = Job.read(folder, rank)
        peer = load(job)
        os.environ["MASTER_PORT"] = wait_for_turn(folder)
        if job.device.type == "cuda":
            torch.cuda.set_device(job.device)
        else:
            torch.set_num_threads(1)
        peer.run(job, Meter(job, done))
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


def give_turn(folder: Path, port: int) -> None:
    """The system before has left: the ranks of this one meet at ``port`` and train."""
    write_whole(folder / TURN, port)


def wait_for_turn(folder: Path) -> str:
    """The port of ``give_turn``; leaves when nobody remains who could call it."""
    parent = os.getppid()
    while not (folder / TURN).exists():
        if os.getppid() != parent:
            leave(1)
        time.sleep(POLL_S)
    return (folder / TURN).read_text()


def leave(status: int) -> None:
    """At once: tearing down process groups and frameworks can take long, or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
