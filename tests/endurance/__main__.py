"""``python -m tests.endurance steps=10000 fits=100``: a long fit and many fits, and whether anything grows.

Prints a table; the exit status is 1 where something grew.
"""

from __future__ import annotations

import os

# Ranks are forked from this process, and a forked OpenMP pool hangs.
os.environ["OMP_NUM_THREADS"] = "1"

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.endurance.fits import long_fit, many_fits
from tests.endurance.usage import Usage, faults_of, growth, settled
from tests.ranks import run_ranks
from tests.settings import settings_of

NUM_RANKS = 2
SAVE_EVERY = 500  # steps
SAMPLES = 100  # of the long fit
STEPS_OF_A_FIT = 6
PATIENCE_S = 3600

# Of resident memory, behind the warm-up: docs/results/endurance.md says where it comes from.
MOST_GROWTH = 0.005


def main(argv: list[str]) -> int:
    """One fit of ``steps`` steps, then ``fits`` short ones in two other processes; 0 leaves one of the two out.

    With ``hold=1`` the short ones keep every Trainer, which must be found to grow.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # of every Trainer
    try:
        options = settings_of(argv, {"steps": 10_000, "fits": 100, "hold": 0})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps, fits = options["steps"], options["fits"]
    faults = []
    print("| what | rank | seconds | MiB behind the warm-up | MiB at the end | growth | files | threads |")
    print("|---|---|---|---|---|---|---|---|")
    if steps:
        faults += _try(f"{steps:,} steps", long_fit, steps, SAVE_EVERY, max(1, steps // SAMPLES))
    if fits:
        faults += _try(f"{fits:,} fits", many_fits, fits, STEPS_OF_A_FIT, bool(options["hold"]))
    print("\n" + ("\n".join(faults) or "nothing grew"))
    return int(bool(faults))


def _try(name: str, fn: Callable[..., list[Usage]], *args: Any) -> list[str]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(NUM_RANKS, fn, Path(folder), *args, timeout_s=PATIENCE_S)
    seconds = time.monotonic() - began
    faults = []
    for rank, samples in enumerate(ranks):
        kept = settled(samples)
        memory = [usage.rss_bytes for usage in kept]
        first, last = (f"{size / 2**20:.1f}" for size in (memory[0], memory[-1]))
        files, threads = (f"{min(seen)} to {max(seen)}" for seen in _counts(kept))
        print(f"| {name} | {rank} | {seconds:.0f} | {first} | {last} | {growth(memory):+.2%} | {files} | {threads} |")
        faults += [f"{name}, rank {rank}: {fault}" for fault in faults_of(samples, MOST_GROWTH)]
    return faults


def _counts(samples: list[Usage]) -> tuple[list[int], list[int]]:
    return [usage.files for usage in samples], [usage.threads for usage in samples]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
