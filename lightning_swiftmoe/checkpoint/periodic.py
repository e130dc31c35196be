"""Checkpoints of a long run: by steps, by minutes, at the end, and where a signal ends it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

_NAME = re.compile(r"step-(\d+)\.ckpt")
_LOOK_AT_CLOCK = 20  # steps: the ranks hear from rank 0 whether it is time, which a step should not wait for


class PeriodicCheckpoint(Checkpoint):
    """Saves ``step-N.ckpt``, whichever of its two periods is over first, and keeps the newest.

    Args:
        dirpath: folder of the files; made where it is missing.
        every_n_steps: optimizer steps; None: not by steps.
        every_minutes: minutes since the last file, looked at every 20 steps; None: not by time.
        keep: files to keep.

    Raises:
        ValueError: a period or a number of files that is not positive.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        every_n_steps: int | None = 1000,
        every_minutes: float | None = 30,
        keep: int = 2,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes), ("keep", keep)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self._last_step = 0  # nothing to save before the first step
        self._last_time = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training whether files can be written.

        Raises:
            ValueError: they cannot.
        """
        refusal = _refusal(self.dirpath) if trainer.is_global_zero and stage == "fit" else None
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise ValueError(refusal)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._last_time = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # micro-batches of a step that is still to come
            return
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if by_steps or self._is_time(trainer, step):
            self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A signal ends all ranks between two steps; any other exception ends one of them anywhere."""
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _is_time(self, trainer: Trainer, step: int) -> bool:
        if self.every_minutes is None or step % _LOOK_AT_CLOCK:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._last_time >= 60 * self.every_minutes)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._last_step:
            return
        newest = self.dirpath / f"step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(newest)
        self._last_step = trainer.global_step
        self._last_time = time.monotonic()
        if trainer.is_global_zero:
            # The newest has no name yet where it is written in the background.
            older = [path for path in checkpoints_in(self.dirpath) if path != newest]
            for path in older[: len(older) - self.keep + 1]:
                trainer.strategy.remove_checkpoint(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """Files of ``PeriodicCheckpoint``, the newest last."""
    found = {int(match[1]): path for path in folder.glob("*.ckpt") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def step_of(path: Path) -> int:
    """Of a file of ``PeriodicCheckpoint``: optimizer steps before it."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not named step-N.ckpt")
    return int(match[1])


def _refusal(folder: Path) -> str | None:
    """Why files cannot be written there; None: they can."""
    trial = folder / f".{os.getpid()}.trial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        return f"checkpoints cannot be written to {folder} ({error.strerror}): choose another folder"
    return None
