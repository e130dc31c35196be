"""What users hand over: one line says what was got, what was expected, and which name was nearly right."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any, ParamSpec

P = ParamSpec("P")

_LONGEST = 100
_ALIKE = 0.7  # at 0.6, which is usual, "speed" is nearly "fused"


def check(ok: bool, name: str, got: object, expected: str) -> None:
    """Raise a ValueError where ``ok`` is not true: ``name`` must be what was ``expected``."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {described(got)}{_without_quotes(got)}")


def check_count(name: str, value: object, expected: str = "a positive integer", *, least: int = 1) -> None:
    """Raise a ValueError for what is no integer of at least ``least``; a truth value is none."""
    check(is_integer(value) and value >= least, name, value, expected)  # type: ignore[operator]


def check_number(name: str, value: object, expected: str, *, above: float) -> None:
    """Raise a ValueError for what is no finite number above ``above``."""
    check(is_number(value) and value > above, name, value, expected)  # type: ignore[operator]


def check_not_negative(name: str, value: object) -> None:
    """Raise a ValueError for what is no finite number of at least zero."""
    check(is_number(value) and value >= 0, name, value, "a number, zero or more")  # type: ignore[operator]


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError for what is neither True nor False."""
    check(isinstance(value, bool), name, value, "True or False")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError for what is none of ``choices``; says which one may have been meant."""
    if not isinstance(value, str) or value not in choices:
        expected = f"one of {', '.join(choices)}"
        raise ValueError(f"{name} must be {expected}, got {described(value)}{did_you_mean(value, choices)}")


def is_integer(value: object) -> bool:
    """Whether it is one, of Python's or NumPy's; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite one; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def knows_its_names(init: Callable[P, None]) -> Callable[P, None]:
    """For an ``__init__``: a keyword that it does not have is answered with the one that was meant."""
    names = [name for name in signature(init).parameters if name != "self"]

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in names:
                hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
                raise TypeError(f"{type(args[0]).__name__} got an unexpected keyword argument {name!r}{hint}")
        init(*args, **kwargs)

    return checked


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where a name is nearly right, else nothing."""
    near = nearest(given, names)
    return f"; did you mean {near!r}?" if near else ""


def nearest(given: object, names: Iterable[str]) -> str | None:
    """The name that ``given`` may stand for: spelt alike, or the only one that it is part of."""
    if not isinstance(given, str) or not given:
        return None
    lower = {name.lower(): name for name in names}
    close = get_close_matches(given.lower(), lower, n=1, cutoff=_ALIKE)
    holding = [name for name in lower if given.lower() in name]
    found = close or (holding if len(holding) == 1 else [])
    return lower[found[0]] if found else None


def described(value: Any) -> str:
    """``repr`` on one line; of an array, its shape and type."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _without_quotes(value: object) -> str:
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return f": write {value.strip()} without quotes"
