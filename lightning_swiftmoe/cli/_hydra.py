"""Runs a Hydra task with one clear line for what users get wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_swiftmoe.cli.compose import prepare_hydra


def run_task(config_name: str, task: Callable[[DictConfig], None], argv: Sequence[str]) -> int:
    """Compose ``conf/<config_name>.yaml`` with the overrides in ``argv`` and call ``task``; ``-m`` sweeps.

    Returns:
        The exit status: 2 for a user's mistake (``ValueError``, or an override that Hydra refuses), which is one line
        on stderr. Anything else is a bug and keeps its traceback.
    """
    prepare_hydra()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # the one line is ours to write
    mistakes: list[Exception] = []

    def guarded(config: DictConfig) -> None:
        # Hydra would print lines of its own if this went through it; and a sweep goes on with the next job.
        try:
            task(config)
        except (ValueError, OmegaConfBaseException) as error:
            mistakes.append(error)

    before, sys.argv = sys.argv, ["swiftmoe", *argv]
    try:
        hydra.main(version_base="1.3", config_path="pkg://lightning_swiftmoe.conf", config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        mistakes.append(error)
    finally:
        sys.argv = before
    if mistakes and os.environ.get("SWIFTMOE_TRACEBACK"):
        raise mistakes[0]
    for mistake in mistakes:
        # Not through rich: it would take [steps, layers] for markup.
        print(f"error: {one_line(mistake)}", file=sys.stderr)
    return 2 if mistakes else 0


def one_line(error: BaseException) -> str:
    """What a user needs of an error: the first cause, its first paragraph, on one line."""
    while error.__cause__ is not None and isinstance(error, (HydraException, OmegaConfBaseException)):
        error = error.__cause__
    text = str(error).split("\n    full_key")[0].split("\nConfig search path")[0]
    return " ".join(text.split())
