"""``python -m tests.configs count=1000 seed=0``: random trainings on ranks, each beside one process.

Prints a line for each that differs and a table at the end; the exit status is 1 where something was wrong.
"""

from __future__ import annotations

import os

# Ranks are forked from this process, and a forked OpenMP pool hangs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # DDP warns of every search for unused parameters

import logging
import sys
import time
import warnings
from collections import Counter, defaultdict

import torch

from tests.configs.compare import faults_of, on_ranks, shrunk
from tests.configs.configuration import Configuration, drawn
from tests.settings import settings_of


def main(argv: list[str]) -> int:
    """Run ``count`` configurations that ``seed`` draws."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # of every Trainer
    try:
        options = settings_of(argv, {"count": 1000, "seed": 0, "shrink": 1})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"count={options['count']} seed={options['seed']}", flush=True)
    by_ranks: dict[int, list[Configuration]] = defaultdict(list)
    for configuration in drawn(options["count"], options["seed"]):
        by_ranks[configuration.num_ranks].append(configuration)
    refused: Counter[str] = Counter()
    rows = []
    for num_ranks, configurations in sorted(by_ranks.items()):
        began, mismatches, refused_before = time.monotonic(), 0, refused.total()
        for configuration, outcomes in on_ranks(configurations):
            if outcomes[0].refused:
                refused[outcomes[0].refused] += 1
            faults = faults_of(configuration, outcomes)
            if faults:
                mismatches += 1
                small = shrunk(configuration) if options["shrink"] else configuration
                print(f"{small}: {'; '.join(faults)}", flush=True)
        seconds = time.monotonic() - began
        rows.append((num_ranks, len(configurations), mismatches, refused.total() - refused_before, seconds))
        print(f"{num_ranks} rank(s): {len(configurations)} configurations in {seconds:.0f} s", flush=True)
    for sentence, times in refused.most_common():
        print(f"refused {times} times: {sentence}")
    print("\n| ranks | configurations | mismatches | refused | seconds |\n|---|---|---|---|---|")
    total = ("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
    for name, count, wrong, no, seconds in [*rows, total]:
        print(f"| {name} | {count} | {wrong} | {no} | {seconds:.0f} |")
    return int(any(wrong for _, _, wrong, _, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
