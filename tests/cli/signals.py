"""What a run gets as a callback, so that a signal reaches it in a certain step."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class SignalInStep(pl.Callback):
    """Sends ``name`` to the process of ``rank`` while step ``step`` runs."""

    def __init__(self, name: str, step: int, rank: int = 0) -> None:
        self.signal = getattr(signal, name)
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signal)


class KillOnce(pl.Callback):
    """Kills a rank in a step, the first time that any run gets there.

    Args:
        where: a file for each kill that was done is made here.
        kills: steps, and the rank that is killed in each.
    """

    def __init__(self, where, kills):
        self.where, self.kills = Path(where), {int(step): int(rank) for step, rank in kills.items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step = trainer.global_step
        done = self.where / f"killed-in-{step}"
        if self.kills.get(step) == trainer.global_rank and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
