"""Options of a composed config against what takes them, before anything is built.

Whoever is given ``max_steps: abc`` would fail somewhere inside, and say nothing of ``trainer.max_steps``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from inspect import Parameter, signature
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from typing_extensions import is_protocol

from lightning_swiftmoe.arguments import did_you_mean
from lightning_swiftmoe.cli._mistakes import unknown_key

_SAID = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_ANNOTATED = ("lightning_swiftmoe", "lightning", "torch")
_LISTS = (list, tuple, Sequence, Collection)


def check_options(config: DictConfig) -> None:
    """Look at every option in ``config`` and below.

    Raises:
        ValueError: a key that its schema, or what its ``_target_`` names, does not have; a value of another type.
    """
    for place, node in _nodes(config):
        _check_schema(place, node)
        if "_target_" in node:
            _check_arguments(place, node)


def _nodes(config: DictConfig, place: str = "") -> Iterator[tuple[str, DictConfig]]:
    yield place, config
    for key in config:
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if isinstance(value, DictConfig):
            yield from _nodes(value, place + str(key) + ".")


def _check_schema(place: str, node: DictConfig) -> None:
    """What was added by ``+`` passes the schema unseen."""
    schema = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(schema):
        return
    known = {field.name for field in dataclasses.fields(schema)}
    for key in map(str, node):
        if key not in known:
            others = OmegaConf.masked_copy(node, [name for name in map(str, node) if name in known])
            raise ValueError(unknown_key(others, key, f"{place}{key}", ["recipes"]))


def _check_arguments(place: str, node: DictConfig) -> None:
    try:
        target = resolve_name(node["_target_"])
        parameters = signature(target).parameters
    except Exception:
        return  # who builds it will say what is wrong
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    for key in (str(key) for key in node if not str(key).startswith("_")):
        if key not in parameters:
            if takes_any:
                continue
            said = f"{place}{key}: {node['_target_'].rpartition('.')[2]} has no argument {key!r}"
            raise ValueError(said + (did_you_mean(key, parameters) or f": leave it out by ~{place}{key}"))
        value = node[key]
        is_default = value is None and parameters[key].default is None
        if not is_default and key in hints and not _fits(value, hints[key]):
            got = "null" if value is None else repr(value)
            raise ValueError(f"{place}{key} must be {_said(hints[key])}, got {got}")


def _hints(target: Any) -> dict[str, Any]:
    """Types of arguments; none of packages whose annotations nobody here has tried."""
    if str(target.__module__).partition(".")[0] not in _ANNOTATED:
        return {}
    if isinstance(target, type):
        target = next(vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls))
    try:
        return get_type_hints(target)
    except Exception:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a scalar may stand where ``hint`` is; false only where that is sure."""
    if not isinstance(value, (str, int, float, bool, NoneType)):
        return True
    members = _members(hint)
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        kinds: tuple[Any, ...] = (type(value), float)
    else:
        kinds = (type(value),)
    return any(member in kinds or _may_be(value, member) for member in members)


def _may_be(value: Any, member: Any) -> bool:
    """For what is no scalar type itself."""
    if member in _SAID or get_origin(member) in _LISTS or member in _LISTS:
        return False
    if isinstance(member, type) and member is not Any and not is_protocol(member):
        return isinstance(value, member) or (isinstance(value, str) and issubclass(member, (Path, os.PathLike)))
    return True


def _members(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [member for part in get_args(hint) for member in _members(part)]
    return [hint]


def _said(hint: Any) -> str:
    said = []
    members = _members(hint)
    for member in members:
        origin = get_origin(member)
        if member is int and float in members:
            continue
        if origin is Literal:
            said += [str(value) for value in get_args(member)]
        elif origin in _LISTS or member in _LISTS:
            said.append("a list")
        elif member in _SAID:
            said.append(_SAID[member])
    return " or ".join(dict.fromkeys(said)) or str(hint)
