"""Options against what takes them, without composing a run for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
from omegaconf import OmegaConf

from lightning_swiftmoe.cli import _options
from lightning_swiftmoe.cli._options import check_options


class Acts(Protocol):
    def act(self): ...


class Takes:
    def __init__(
        self,
        count: int = 1,
        rate: float = 0.1,
        flag: bool = False,
        name: str | None = None,
        file: str | Path = "",
        words: Sequence[str] = (),
        either: int | float | None = None,
        kind: Literal["a", "b"] = "a",
        anything: Any = None,
        unknown=None,
        policy: str | Acts = "",
        source: Acts | None = None,
        schedule: dict[int, int] | None = None,
        late: int = None,  # noqa: RUF013
    ):
        pass


class Inherits(Takes):
    pass


class TakesAll:
    def __init__(self, count: int = 1, **kwargs: Any):
        pass


@pytest.fixture(autouse=True)
def _ours(monkeypatch):
    monkeypatch.setattr(_options, "_ANNOTATED", (__name__.partition(".")[0],))


def check(options, cls=Takes):
    check_options(OmegaConf.create({"group": {"_target_": f"{__name__}.{cls.__name__}", **options}}))


@pytest.mark.parametrize(
    "options",
    [
        {"count": 2, "rate": 1, "flag": True, "name": "x", "file": "x", "words": ["x"], "either": 0.5, "kind": "a"},
        {"rate": 0.5, "name": None, "either": None, "words": [], "late": None},
        {"kind": "of its own", "anything": 3, "unknown": "x", "policy": "x", "source": "x"},
        {"anything": {"_target_": "nowhere.Nobody", "x": 1}},
        {"schedule": {0: 1, 4: 2}},
    ],
)
def test_what_fits(options):
    check(options)
    check(options, Inherits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": "2"}, "group.count must be an integer, got '2'"),
        ({"count": 2.5}, "group.count must be an integer, got 2.5"),
        ({"count": True}, "group.count must be an integer, got True"),
        ({"count": None}, "group.count must be an integer, got null"),
        ({"rate": "fast"}, "group.rate must be a number, got 'fast'"),
        ({"flag": 1}, "group.flag must be true or false, got 1"),
        ({"name": 3}, "group.name must be text or null, got 3"),
        ({"words": "x"}, "group.words must be a list, got 'x'"),
        ({"either": "x"}, "group.either must be a number or null, got 'x'"),
        ({"cuont": 1}, "group.cuont: Takes has no argument 'cuont'; did you mean 'count'"),
        ({"zzz": 1}, "group.zzz: Takes has no argument 'zzz': leave it out by ~group.zzz"),
        ({"anything": {"_target_": f"{__name__}.TakesAll", "count": "x"}}, "group.anything.count must be an integer"),
    ],
)
def test_what_does_not_fit(options, message):
    for cls in (Takes, Inherits):
        with pytest.raises(ValueError, match=message.replace("Takes has", f"{cls.__name__} has")):
            check(options, cls)


def test_what_takes_any_keyword():
    check({"count": 3, "more": "x"}, TakesAll)


def test_other_packages_annotations_are_no_promise(monkeypatch):
    monkeypatch.setattr(_options, "_ANNOTATED", ("lightning",))
    check({"count": "auto"})
    with pytest.raises(ValueError, match="Takes has no argument 'cuont'"):
        check({"cuont": 1})
