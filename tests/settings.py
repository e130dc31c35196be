"""``KEY=VALUE`` words of the commands that tests come with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def settings_of(argv: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults``, with what the words say in their place, each of its default's type.

    Raises:
        ValueError: an unknown key, or a value of another type; integers count from 0.
    """
    found = dict(defaults)
    for word in argv:
        key, _, value = word.partition("=")
        if key not in defaults:
            raise ValueError(f"unknown setting {key!r}; there are {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is int and not value.isdecimal():
            raise ValueError(f"{key} must be a number from 0, got {value!r}")
        found[key] = kind(value)
    return found
