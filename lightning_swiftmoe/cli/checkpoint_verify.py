"""``swiftmoe checkpoint verify PATH``: would it be loaded, and are its weights numbers?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_swiftmoe.checkpoint.reading import first_of
from lightning_swiftmoe.checkpoint.sums import named_tensors, not_finite, what_we_added
from lightning_swiftmoe.cli._checkpoint import run_on_checkpoint


def main(argv: Sequence[str]) -> int:
    """Exit status 0 for a good checkpoint, 1 for a bad one, 2 for a user's mistake."""
    return run_on_checkpoint(argv, "usage: swiftmoe checkpoint verify PATH", verify)


def verify(path: Path, checkpoint: Mapping[str, Any]) -> int:
    """One line: what was looked at, or what is wrong."""
    if broken := not_finite(checkpoint):
        print(f"error: {path} holds NaN or Inf in {first_of(broken)}: choose an earlier checkpoint", file=sys.stderr)
        return 1
    count = sum(1 for _ in named_tensors(checkpoint))
    known = "as they were saved" if what_we_added(checkpoint) else "read, but whoever saved them made no checksums"
    print(f"{path}: {count} tensors {known}; all weights are finite")
    return 0
