"""Runs a Hydra task with one clear line for what users get wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_swiftmoe.cli._folders import folders_there, remove_unused
from lightning_swiftmoe.cli._mistakes import one_line, unknown_option
from lightning_swiftmoe.cli.compose import prepare_hydra


def run_task(config_name: str, task: Callable[[DictConfig], None], argv: Sequence[str]) -> int:
    """Compose ``conf/<config_name>.yaml`` with the overrides in ``argv`` and call ``task``; ``-m`` sweeps.

    Returns:
        The exit status: 2 for a user's mistake (``ValueError``, a package that is missing, or an override that Hydra
        refuses), which is one line on stderr. Anything else is a bug and keeps its traceback.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(config_name))
        return 0
    if option := unknown_option(argv):
        print(f"error: {option}", file=sys.stderr)
        return 2
    prepare_hydra()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # the one line is ours to write
    mistakes: list[Exception] = []
    there = folders_there(argv)

    def guarded(config: DictConfig) -> None:
        # Hydra would print lines of its own if this went through it; and a sweep goes on with the next job.
        try:
            task(config)
        except (ValueError, ImportError, HydraException, OmegaConfBaseException) as error:
            mistakes.append(error)
            job = HydraConfig.get()
            folder = Path(job.runtime.output_dir)
            if folder not in there:
                remove_unused(folder, job.output_subdir)

    before, sys.argv = sys.argv, [sys.argv[0], *argv]  # the program's name starts further ranks
    try:
        hydra.main(version_base="1.3", config_path="pkg://lightning_swiftmoe.conf", config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        mistakes.append(error)
    except OSError as error:
        if error.filename is None:
            raise
        mistakes.append(
            ValueError(f"{error.filename} cannot be written to ({error.strerror}): set hydra.run.dir to another folder")
        )
    finally:
        sys.argv = before
    if mistakes and os.environ.get("SWIFTMOE_TRACEBACK"):
        raise mistakes[0]
    for mistake in mistakes:
        # Not through rich: it would take [steps, layers] for markup.
        print(f"error: {one_line(mistake, groups_of(config_name))}", file=sys.stderr)
    return 2 if mistakes else 0


def run_benchmark(
    name: str, task: Callable[[DictConfig, list[str]], None], argv: Sequence[str], own: Collection[str]
) -> int:
    """``run_task`` of ``train``'s configuration and, as they are, of the overrides of ``conf/bench/NAME.yaml``.

    Args:
        name: of the benchmark.
        task: takes both.
        argv: the command line.
        own: options of the benchmark; what is inside one belongs to it.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(f"bench/{name}"))
        return 0
    given = [word for word in argv if word.split("=")[0].split(".")[0] in own]
    return run_task("train", lambda config: task(config, given), [word for word in argv if word not in given])


def groups_of(config_name: str) -> list[str]:
    """Config groups from which ``conf/<config_name>.yaml`` chooses."""
    defaults = OmegaConf.create((files("lightning_swiftmoe.conf") / f"{config_name}.yaml").read_text()).defaults
    named = [str(name) for entry in defaults if isinstance(entry, DictConfig) for name in entry]
    return [name for name in named if not name.startswith("override ")]


def help_text(config_name: str) -> str:
    """The config file with its comments: what can be overridden, and what it is when it is not."""
    text = (files("lightning_swiftmoe.conf") / f"{config_name}.yaml").read_text()
    command, comments = config_name.replace("/", " "), text.split("\nhydra:")[0].rstrip()
    return f"usage: swiftmoe {command} [GROUP=FILE | KEY=VALUE] ...\n\n{comments}"
