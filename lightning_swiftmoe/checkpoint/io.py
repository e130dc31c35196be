"""How checkpoints get into files and out of them, for Lightning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_swiftmoe.checkpoint.reading import listed, read_checkpoint, why_unreadable
from lightning_swiftmoe.checkpoint.sums import not_finite, with_sums
from lightning_swiftmoe.checkpoint.whole_file import write_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Files that have their name only when whole, with checksums that are looked at when they are loaded.

    What it writes is an ordinary file of ``torch.save``, for everybody to load. URLs of other file systems (``s3://``)
    are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """As of ``CheckpointIO``.

        Raises:
            OSError: the disk is full, or refuses; a file that was there before is still there, whole.
        """
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = with_sums(checkpoint) if "state_dict" in checkpoint else checkpoint
        local.parent.mkdir(parents=True, exist_ok=True)
        write_whole(local, lambda file: torch.save(content, file))
        if holds := why_unreadable(local):
            rank_zero_warn(
                f"{local} holds {holds}, and will not be loaded: only data is (weights_only=True). Keep such objects "
                "out of hyper-parameters (save_hyperparameters(ignore=...)) and callbacks' states, or allow them by "
                "torch.serialization.add_safe_globals wherever you load it"
            )

    @override
    def load_checkpoint(  # type: ignore[override]
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As of ``CheckpointIO``, but with ``weights_only=True`` whatever is asked for.

        Raises:
            CheckpointError: the file is cut short, was changed, or holds more than data.
        """
        local = local_path(path)
        if local is None:
            return super().load_checkpoint(path, map_location, weights_only=True)
        checkpoint = read_checkpoint(local, map_location)
        if broken := not_finite(checkpoint):
            rank_zero_warn(f"in {local} {listed(broken)} not finite: training goes on from NaN or Inf")
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """A file that a link names takes the link's place: ``last`` (``save_last="link"``) never names a lost file."""
        local = local_path(path)
        link = _link_to(local) if local is not None else None
        if local is not None and link is not None:
            os.replace(local, link)
        else:
            super().remove_checkpoint(path)


def local_path(path: str | Path) -> Path | None:
    """Where a path or URL is on this machine's file systems; None where it is elsewhere."""
    file_system, place = url_to_fs(str(path))
    return Path(place) if isinstance(file_system, LocalFileSystem) else None


def _link_to(path: Path) -> Path | None:
    """A link in the folder of the file ``path`` that names it."""
    if path.is_symlink() or not path.is_file():
        return None
    return next((link for link in path.parent.iterdir() if link.is_symlink() and link.samefile(path)), None)
