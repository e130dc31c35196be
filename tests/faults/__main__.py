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


def main(argv: list[str]) -> int:
    """Run trials ``seed`` to ``seed + kills - 1``."""
    options = {"kills": "500", "seed": "0", "launchers": ",".join(LAUNCHERS), "folders": tempfile.gettempdir()}
    for argument in argv:
        key, _, value = argument.partition("=")
        if key not in options:
            print(f"error: unknown setting {key!r}; there are {', '.join(options)}", file=sys.stderr)
            return 2
        options[key] = value
    expected = expected_weights()
    folders = options["folders"].split(",")
    first, kills = int(options["seed"]), int(options["kills"])
    wrong: Counter[str] = Counter()
    trials: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(first, first + kills):
        with tempfile.TemporaryDirectory(dir=folders[seed % len(folders)]) as place:
            trial = Trial.of(seed, Path(place), tuple(options["launchers"].split(",")))
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
