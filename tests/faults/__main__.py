"""``python -m tests.faults kills=500 seed=0``: kill ranks of small jobs anywhere, and see that nothing is lost.

Prints a line for each trial and a table at the end; the exit status is 1 where something was wrong.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.trials import LAUNCHERS, Trial, expected_weights, faults_of
from tests.settings import settings_of


def main(argv: list[str]) -> int:
    """Run trials ``seed`` to ``seed + kills - 1``."""
    defaults = {
        "kills": 500,
        "seed": 0,
        "redundancy": 1,
        "transport": "",
        "launchers": "",
        "folders": tempfile.gettempdir(),
    }
    try:
        options = settings_of(argv, defaults)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    expected = expected_weights(options["transport"])
    folders = options["folders"].split(",")
    # torchrun ends all ranks where one dies: none is left to save anything.
    usual = LAUNCHERS if options["redundancy"] == 1 else LAUNCHERS[:3]
    launchers = tuple(options["launchers"].split(",")) if options["launchers"] else usual
    first, kills = options["seed"], options["kills"]
    wrong: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(first, first + kills):
        with tempfile.TemporaryDirectory(dir=folders[seed % len(folders)]) as place:
            trial = Trial.of(seed, Path(place), launchers, options["redundancy"], options["transport"])
            faults = faults_of(trial, expected, Path(place))
        trials[trial.launcher] += 1
        wrong[trial.launcher] += bool(faults)
        rank, step, phase = trial.plan.killed or (0, 0, "")
        told = "; ".join(faults) or "right"
        print(
            f"seed {seed}: {trial.launcher}, rank {rank} of {trial.plan.num_ranks} killed in step {step}, {phase}; "
            f"went on with {trial.num_ranks_after}: {told}",
            flush=True,
        )
    print(f"\n{'launcher':10} {'kills':>6} {'wrong':>6}")
    for name, count in sorted(trials.items()):
        print(f"{name:10} {count:>6} {wrong[name]:>6}")
    print(f"{kills} kills from seed {first} in {time.monotonic() - began:.0f} s")
    return int(bool(sum(wrong.values())))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
