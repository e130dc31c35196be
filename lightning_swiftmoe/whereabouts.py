"""Where this rank is: the line of the user's code that it has come to, in a line of text."""

from __future__ import annotations

import linecache
import sys
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_LINE_WIDTH = 200
# What Lightning and we do by functions of these names, for frames in which no line of the user's says so.
_DOING = {
    "setup": "setting up",
    "end_where_asked": "at the head of a training step",
    "training_step": "in a training step",
    "backward": "in a backward",
    "optimizer_step": "in an optimizer's step",
    "validation_step": "in a validation step",
    "save_checkpoint": "saving a checkpoint",
    "teardown": "at the end of fit",
}

_Frames = Sequence[tuple[FrameType, int]]  # each with its line, the innermost last


def cut(line: str) -> str:
    """What a terminal shows of it."""
    return line if len(line) <= _LINE_WIDTH else f"{line[:_LINE_WIDTH]} ..."


def place_of(error: BaseException) -> str:
    """Where the main thread was when ``error`` was raised there; one that was not raised is said for where it is."""
    # An error knows the frames that it went through, and not those above.
    return _place(_callers(_main_frame()) + list(traceback.walk_tb(error.__traceback__)))


def place_of_main_thread() -> str:
    """Where it is now, whichever thread asks."""
    return _place(_callers(_main_frame()))


def error_of_main_thread() -> BaseException | None:
    """What it is handling now, if anything."""
    handled: Any = sys._current_exceptions().get(_main_ident())
    return handled[1] if isinstance(handled, tuple) else handled  # a tuple before Python 3.12


def _main_ident() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _main_frame() -> FrameType:
    return sys._current_frames()[_main_ident()]


def _callers(frame: FrameType) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_stack(frame))[::-1]


def _place(frames: _Frames) -> str:
    """``FILE:LINE, in FUNCTION: CODE`` of the innermost frame of the user's, behind what others do on its behalf."""
    users = [number for number, (frame, _) in enumerate(frames) if _is_users(frame)]
    others = [number for number, (frame, _) in enumerate(frames) if _is_frameworks(frame)]
    innermost = (users or others or [len(frames) - 1])[-1]
    frame, line = frames[innermost]
    file = frame.f_code.co_filename
    code = cut(linecache.getline(file, line, frame.f_globals).strip())
    place = f"{file}:{line}, in {frame.f_code.co_name}: {code}"
    inside = [frame for frame, _ in frames[innermost:] if _is_frameworks(frame)]
    doing = [_DOING[frame.f_code.co_name] for frame in inside if frame.f_code.co_name in _DOING]
    return f"{doing[-1]}, from {place}" if doing else place


def _is_users(frame: FrameType) -> bool:
    """Whether its code is neither Python's, nor of an installed package, nor ours but for the models."""
    file = Path(frame.f_code.co_filename)
    if str(file).startswith("<frozen ") or {"site-packages", "dist-packages"} & set(file.parts):
        return False
    if file.is_relative_to(sysconfig.get_path("stdlib")):
        return False
    return not _is_frameworks(frame) or _module(frame).startswith("lightning_swiftmoe.models.")


def _is_frameworks(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in ("lightning", "lightning_swiftmoe")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
