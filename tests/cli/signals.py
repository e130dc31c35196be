"""What a run gets as a callback, so that a signal reaches it in a certain step."""

import os
import signal

import lightning.pytorch as pl


class SignalInStep(pl.Callback):
    """Sends ``name`` to the process of ``rank`` while step ``step`` runs."""

    def __init__(self, name: str, step: int, rank: int = 0) -> None:
        self.signal = getattr(signal, name)
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.signal)
