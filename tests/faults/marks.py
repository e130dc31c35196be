"""What a run writes about itself as it trains, so that every step is known which a kill took away."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl


class Marks(pl.Callback):
    """Appends a line for the start of training and for the end of every step: what it was, the step, and seconds.

    Seconds are of ``time.time``: runs that follow each other, and who kills them, read the same clock. Only the first
    rank writes. A written line is the kernel's and survives SIGKILL.

    Args:
        file: to append to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, trainer, pl_module):
        self._write(trainer, "start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning calls the callback that saves behind this one.
        self._write(trainer, "step")

    def _write(self, trainer: pl.Trainer, what: str) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{what} {trainer.global_step} {time.time():.6f}\n")
