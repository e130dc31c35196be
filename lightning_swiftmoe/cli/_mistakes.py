"""What a user hears of a mistake: one line, with the key, what was expected and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lightning_swiftmoe.arguments import did_you_mean, nearest
from lightning_swiftmoe.cli.recipes import recipes

_HYDRA_OPTIONS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
_NO_GROUP = re.compile(r"(?:In '(?P<file>.+)': )?Could not override '(?P<group>.+)'\. No match in the defaults list")
_PACKAGES_OF = {"hydra/launcher/submitit_slurm": "lightning-swiftmoe[slurm]"}


def one_line(error: BaseException, groups: Sequence[str] = ()) -> str:
    """What a user needs of an error: the first cause, its first paragraph, on one line.

    Args:
        error: that was raised.
        groups: config groups of the command.
    """
    where = ""
    while error.__cause__ is not None and isinstance(error, (HydraException, OmegaConfBaseException)):
        if isinstance(error, InstantiationException):
            where = str(error).partition("full_key: ")[2].strip()
        error = error.__cause__
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: an override is KEY=VALUE without spaces, as in trainer.max_steps=50"
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and isinstance(error.parent_node, DictConfig):
        return unknown_key(error.parent_node, str(error.key), str(error.full_key), groups)
    text = " ".join(
        str(error).split("\n    full_key")[0].split("\nAvailable")[0].split("\nConfig search path")[0].split()
    )
    if isinstance(error, MissingConfigException) and error.options:
        return text + _instead_of(str(error.missing_cfg_file), error.options)
    if (found := _NO_GROUP.match(text)) is not None:
        return _no_group(found["file"], found["group"], groups)
    key = getattr(error, "full_key", None) or where
    if text.endswith("is not Optional"):
        return f"{key} cannot be null"
    if text.endswith("is not a ListConfig, list or tuple."):
        return f"{key} must be a list: write {key}=[...]"
    return f"{key}: {text}" if key and key not in text else text


def check_list(name: str, value: object) -> None:
    """Raise a ValueError for what is no list: on the command line a single name is easily written without brackets."""
    if not isinstance(value, (list, tuple, ListConfig)):
        got, inside = ("null", "...") if value is None else (repr(value), value)
        raise ValueError(f"{name} must be a list, got {got}: write {name}=[{inside}]")


def unknown_key(parent: DictConfig, key: str, full_key: str, groups: Iterable[str] = ()) -> str:
    """What to say of a key that a config does not have.

    Args:
        parent: where it was looked for.
        key: its own name.
        full_key: with those of its parents.
        groups: config groups of the command, which need not have a key of their own.
    """
    place, there_is = full_key.removesuffix(key), f"there is no {full_key!r}"
    names = [str(name) for name in parent if not str(name).startswith("_") and name != "hydra"]
    arguments = arguments_of(parent.get("_target_"))
    if key in arguments:
        return f"{there_is} in the config so far: add it by +{full_key}=VALUE"
    groups = [] if place else list(groups)
    if near := nearest(key, [*names, *arguments, *groups]):
        plus = "" if near in [*names, *groups] else "+"
        return f"{there_is}; did you mean {plus + place + near!r}?"
    return f"{there_is}; {place.rstrip('.') or 'at the top'} has {', '.join(names) or 'no keys'}"


def arguments_of(target: Any) -> list[str]:
    """Names that a ``_target_`` takes; none where that is not known."""
    try:
        return list(signature(resolve_name(target)).parameters)
    except Exception:
        return []


def unknown_option(argv: Iterable[str]) -> str | None:
    """What to say of ``--key=value``, which Hydra's parser would answer with a page of usage; None: nothing."""
    for argument in argv:
        if argument.startswith("--") and argument[2:].partition("=")[0] not in _HYDRA_OPTIONS:
            return f"unknown option {argument!r}: overrides have no dashes, as in {argument.lstrip('-') or 'KEY=VALUE'}"
    return None


def _instead_of(missing: str, options: Sequence[str]) -> str:
    if missing in _PACKAGES_OF:
        return f": pip install {_PACKAGES_OF[missing]!r}"
    name = missing.rpartition("/")[2]
    names = {option for option in options if not option.startswith("_") and "schema" not in option}
    if missing.startswith("recipes/"):
        name = missing.removeprefix("recipes/")
        names |= set(recipes())  # Hydra leaves those in folders out
    return f"; there are {', '.join(sorted(names))}{did_you_mean(name, sorted(names))}"


def _no_group(file: str | None, group: str, groups: Sequence[str]) -> str:
    """What to say of a group that a command has not. Hydra advises to append it, and then nothing reads it.

    Args:
        file: that wants to choose from it; None for an override.
        group: its name.
        groups: those of the command.
    """
    if file == "model/hf":  # a model that brings its module, which only training has
        return "model=hf is for swiftmoe train; swiftmoe plan takes the folder of a model by hf=FOLDER"
    there_are = ", ".join(groups)
    if file is not None:
        chosen = file.replace("/", "=", 1)
        return f"{chosen} sets {group!r}, and the groups here are {there_are}: is it for swiftmoe train?"
    if group == "recipes":
        return (
            "swiftmoe plan takes no recipe: name what the recipe chooses, as in swiftmoe plan model=gpt_small "
            "cluster=h100_8x8 slots_per_rank=4 offload=true"
        )
    return f"there is no group {group!r} here; there are {there_are}"
