"""Folders of jobs that were refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_HYDRAS_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")
# Whoever starts ranks numbers them in some of these.
_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"),
    *("JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
)


def folders_there(argv: Sequence[str]) -> list[Path]:
    """Run folders that ``argv`` names and that exist: they are their users', empty or not."""
    named = [Path(word.partition("=")[2]).absolute() for word in argv if word.startswith("hydra.run.dir=")]
    return [folder for folder in named if folder.exists()]


def remove_unused(folder: Path, own: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Remove the folder that Hydra made for a job which was refused: nothing ran there.

    It stays where anything else lies in it. Folders above it that are empty then go as well, up to the current one.

    Args:
        folder: of the job.
        own: name of the folder inside for Hydra's own files; None where it writes none.
        environment: tells the rank.
    """
    here = Path.cwd()
    is_first = all(environment.get(name, "0") == "0" for name in _RANKS)  # others share its folder
    if not is_first or folder == here or folder in here.parents:
        return
    with suppress(OSError):  # files of somebody else appeared
        if any(path.name != own for path in folder.iterdir()):
            return
        if own is not None:
            for name in _HYDRAS_FILES:
                (folder / own / name).unlink(missing_ok=True)
            (folder / own).rmdir()
        folder.rmdir()
        _stop_logging_to(folder)
        for above in folder.parents:
            if here not in above.parents:
                return
            above.rmdir()


def _stop_logging_to(folder: Path) -> None:
    """Hydra's log file would be opened by the first line, also of whoever goes on in this process."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and folder in Path(handler.baseFilename).parents:
            root.removeHandler(handler)
            handler.close()
