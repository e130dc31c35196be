"""Which rank failed first, and why: one block of few lines, printed last.

When a rank fails, the others fail as well a moment later, each with a traceback of its own about a lost connection.
Ranks that a Lightning launcher started therefore write down their errors in a folder of the host, and the process that
the user started prints them: the consequences in a line each, then the first cause.
"""

from __future__ import annotations

import atexit
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from lightning_swiftmoe.parallel.communicator import ExchangeError

MOST_LINES = 30

_MOST_CAUSE_LINES = 20
_MOST_OTHERS = 6
_LINE_WIDTH = 200
_SIGNS_OF_A_LOST_PEER = ("gloo", "NCCL", "Connection reset", "Connection closed")


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    Args:
        rank: of the job.
        when: seconds since the epoch; infinity where only the end of the process was seen.
        consequence: whether it tells of the failure of another rank.
        text: the traceback, or a sentence.
    """

    rank: int
    when: float
    consequence: bool
    text: str

    @classmethod
    def of_error(cls, rank: int, error: BaseException) -> Failure:
        """From what was raised."""
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(rank, time.time(), _tells_of_another(error), text)

    @classmethod
    def of_exit(cls, rank: int, code: int) -> Failure:
        """From a process that ended without a word; a negative code is a signal."""
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": out of memory, or somebody killed it" if name == "SIGKILL" else ""
            return cls(rank, float("inf"), False, f"rank {rank} was killed by {name}{hint}")
        return cls(rank, float("inf"), True, f"rank {rank} ended with exit code {code}")

    @property
    def in_a_line(self) -> str:
        """The error itself, cut to what a terminal shows."""
        last = self.text.splitlines()[-1] if self.text else ""
        return last if len(last) <= _LINE_WIDTH else f"{last[:_LINE_WIDTH]} ..."


class FailureBoard:
    """A folder with one file for each rank of this host that failed.

    Args:
        folder: made by the process the user started; None makes one, which goes when this process ends.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder or tempfile.mkdtemp(prefix="swiftmoe-failures-"))
        if folder is None:
            atexit.register(self.remove)

    def note(self, rank: int, error: BaseException) -> None:
        """Write down the first error of this rank; where that fails, the error matters more."""
        path = self.folder / f"{rank}.json"
        try:
            if not path.exists():
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(asdict(Failure.of_error(rank, error))))
                draft.rename(path)
        except OSError:
            pass

    def has_notes(self) -> bool:
        """Whether some rank wrote down an error."""
        return any(self.folder.glob("*.json"))

    def failures(self, exit_codes: Mapping[int, int]) -> list[Failure]:
        """Of all ranks, the first cause first.

        Args:
            exit_codes: of processes that ended by themselves, by rank.
        """
        written = [Failure(**json.loads(path.read_text())) for path in self.folder.glob("*.json")]
        known = {failure.rank for failure in written}
        silent = [Failure.of_exit(rank, code) for rank, code in exit_codes.items() if code and rank not in known]
        return sorted([*written, *silent], key=lambda failure: (failure.consequence, failure.when, failure.rank))

    def summary(self, exit_codes: Mapping[int, int]) -> str:
        """At most ``MOST_LINES`` lines, the first cause last; empty where nobody failed."""
        found = self.failures(exit_codes)
        if not found:
            return ""
        first, others = found[0], found[1:]
        lines = [f"rank {other.rank}, as a consequence: {other.in_a_line}" for other in others[:_MOST_OTHERS]]
        if len(others) > _MOST_OTHERS:
            lines.append(f"and {len(others) - _MOST_OTHERS} more ranks")
        lines.append(f"The job ended because of rank {first.rank}:")
        return "\n".join([*lines, *_shortened(first.text)])

    def remove(self) -> None:
        """Nobody reads it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def show_instead(error: BaseException, show: Callable[[], bool]) -> None:
    """When ``error`` reaches the end of the program, ``show`` takes the place of its traceback if it returns true."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if value is not error or not show():
            usual(kind, value, trace)

    sys.excepthook = hook


def _tells_of_another(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ExchangeError, dist.DistError)):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _SIGNS_OF_A_LOST_PEER):
            return True
        cause = cause.__cause__
    return False


def _shortened(text: str) -> list[str]:
    said = [line for line in text.splitlines() if line.strip(" ^~")]  # without the marks below a line of code
    lines = [line if len(line) <= _LINE_WIDTH else f"{line[:_LINE_WIDTH]} ..." for line in said]
    if len(lines) <= _MOST_CAUSE_LINES:
        return lines
    return [lines[0], "  ...", *lines[-(_MOST_CAUSE_LINES - 2) :]]
