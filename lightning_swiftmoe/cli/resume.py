"""``swiftmoe train resume=FOLDER``: the same run goes on, from its newest checkpoint."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from lightning_swiftmoe.checkpoint.periodic import checkpoints_in, step_of
from lightning_swiftmoe.cli._dotted import leaves
from lightning_swiftmoe.redundancy import FOLDER as RESCUED

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
_LOCK = ".run.lock"  # it stays: removing it, one run could lock a file that another no longer sees

# Values that are the cluster's, wherever a configuration repeats them.
_OF_CLUSTER = (
    "strategy.process_group_backend",
    "strategy.start_method",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
)

# What may be another in the run that goes on: where it runs, for how long, and what it tells.
_MAY_CHANGE = (
    "callbacks.checkpoint",
    "cluster",
    "report",
    "trainer.enable_progress_bar",
    "trainer.max_steps",
    "trainer.max_time",
)


def folder_of(argv: Sequence[str]) -> Path | None:
    """The run folder that ``argv`` says to resume; None where it says nothing.

    Raises:
        ValueError: it holds no run.
    """
    named = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if not named or named[-1] in ("", "null"):
        return None
    folder = Path(named[-1]).absolute()
    if not (folder / CONFIG).is_file():
        raise ValueError(f"resume={named[-1]}: no run there, it has no {CONFIG}; name the folder of a run")
    return folder


def saved_in(folder: Path) -> list[Path]:
    """Checkpoints of the run in ``folder``, the newest last; of the same step, what ranks that were left saved."""
    return sorted([*checkpoints_in(folder / CHECKPOINTS), *checkpoints_in(folder / RESCUED)], key=step_of)


def newest_checkpoint(folder: Path) -> Path:
    """Of the run in ``folder``.

    Raises:
        ValueError: it has none.
    """
    found = saved_in(folder)
    if not found:
        raise ValueError(f"resume={folder}: the run has saved no {CHECKPOINTS}/step-*.ckpt; start a new one")
    return found[-1]


def resumed_config(config: DictConfig, folder: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of the run in ``folder``, changed where ``overrides`` may change it.

    Args:
        config: composed from the overrides.
        folder: of the run.
        overrides: as given, of values and of groups.

    Raises:
        ValueError: they ask for another run; all differences are named.
    """
    saved = _moved(OmegaConf.load(folder / CONFIG), folder)  # type: ignore[arg-type]
    asked = OmegaConf.to_container(config, resolve=True)
    was = OmegaConf.to_container(saved)
    differences: dict[str, str] = {}
    for key in _keys(overrides, saved):
        for name in leaves(_at(asked, key), key).keys() | leaves(_at(was, key), key).keys():
            old, new = _at(was, name), _at(asked, name)
            if old == new:
                continue
            if _may_change(name):
                OmegaConf.update(saved, name, new, force_add=True)
            else:
                differences[name] = f"{name} was {old}, not {new}"
    if differences:
        told = "; ".join(differences[name] for name in sorted(differences))
        raise ValueError(
            f"resume={folder}: the run cannot go on as another: {told}. Leave these overrides out, or start a new run; "
            f"{', '.join(_MAY_CHANGE)} may change"
        )
    saved.resume = str(folder)
    return saved


def continue_metrics(logger: CSVLogger, step: int) -> None:
    """Let ``logger`` go on with what its file has of the steps before ``step``: it would begin a new one."""
    path = Path(logger.log_dir) / "metrics.csv"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("step") and int(row["step"]) < step]
    writer = logger.experiment
    writer.metrics.extend(rows)
    writer.save()


def make_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir = {folder} cannot be made: {error.strerror}") from error


@contextmanager
def only_run_in(folder: Path, *, resumes: bool) -> Iterator[None]:
    """While this process trains in ``folder``, no other does.

    Raises:
        ValueError: another run is or was there.
        OSError: the folder cannot be written to.
    """
    with (folder / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run trains in {folder}: wait for it, or set hydra.run.dir") from None
        if not resumes and (folder / CONFIG).exists():
            raise ValueError(
                f"{folder} holds a run already: resume={folder} goes on, hydra.run.dir sets another folder"
            )
        yield


def _moved(saved: DictConfig, folder: Path) -> DictConfig:
    """With the paths that it has since the run folder was moved or renamed."""
    text = OmegaConf.to_yaml(saved).replace(str(saved.run_dir), str(folder))
    return OmegaConf.create(text)  # type: ignore[return-value]


def _keys(overrides: Sequence[str], saved: DictConfig) -> list[str]:
    """What overrides set; "" for all, where one chooses a recipe."""
    names = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides]
    names = [name for name in names if name != "resume" and not name.startswith("hydra")]
    if any(name == "cluster" or name.startswith("cluster.") for name in names):
        names += _OF_CLUSTER
    return [name if OmegaConf.select(saved, name) is not None or "." in name else "" for name in names]


def _may_change(name: str) -> bool:
    own = name in ("resume", "run_dir")
    return own or name in _OF_CLUSTER or any(name == free or name.startswith(f"{free}.") for free in _MAY_CHANGE)


def _at(values: Any, key: str) -> Any:
    for part in key.split(".") if key else ():
        values = values.get(part) if isinstance(values, dict) else None
    return values
