"""What a user hears of a mistake: one line, with the key, what was expected and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lightning_swiftmoe.arguments import did_you_mean, nearest

_HYDRA_OPTIONS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
_PACKAGES_OF = {"hydra/launcher/submitit_slurm": "lightning-swiftmoe[slurm]"}


def one_line(error: BaseException) -> str:
    """What a user needs of an error: the first cause, its first paragraph, on one line."""
    where = ""
    while error.__cause__ is not None and isinstance(error, (HydraException, OmegaConfBaseException)):
        if isinstance(error, InstantiationException):
            where = str(error).partition("full_key: ")[2].strip()
        error = error.__cause__
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: an override is KEY=VALUE without spaces, as in trainer.max_steps=50"
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and isinstance(error.parent_node, DictConfig):
        return unknown_key(error.parent_node, str(error.key), str(error.full_key))
    text = " ".join(
        str(error).split("\n    full_key")[0].split("\nAvailable")[0].split("\nConfig search path")[0].split()
    )
    if isinstance(error, MissingConfigException) and error.options:
        return text + _instead_of(str(error.missing_cfg_file), error.options)
    if text.startswith("In 'model/hf': Could not override"):  # a model that brings its module, which only training has
        return "model=hf is for swiftmoe train; swiftmoe plan takes the folder of a model by hf=FOLDER"
    key = getattr(error, "full_key", None) or where
    if text.endswith("is not Optional"):
        return f"{key} cannot be null"
    return f"{key}: {text}" if key and key not in text else text


def unknown_key(parent: DictConfig, key: str, full_key: str) -> str:
    """What to say of a key that a config does not have.

    Args:
        parent: where it was looked for.
        key: its own name.
        full_key: with those of its parents.
    """
    place, there_is = full_key.removesuffix(key), f"there is no {full_key!r}"
    names = [str(name) for name in parent if not str(name).startswith("_") and name != "hydra"]
    arguments = arguments_of(parent.get("_target_"))
    if key in arguments:
        return f"{there_is} in the config so far: add it by +{full_key}=VALUE"
    groups = [] if place else ["recipes"]  # a group without a key of its own
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
    names = [name for name in sorted(options) if not name.startswith("_") and "schema" not in name]
    return f"; there are {', '.join(names)}{did_you_mean(missing.rpartition('/')[2], names)}"
