"""Which rank failed first, and why: one block of few lines, printed last.

When a rank fails, the others fail as well a moment later, each with a traceback of its own about a lost connection.
Ranks that a Lightning launcher started therefore write down their errors in a folder of the host, and the process that
the user started prints them: the consequences in a line each, then the first cause.

Where ranks waited for each other until a timeout, no error is the cause, and the first to time out is not to blame.
What tells then is where each rank was: of those that failed their errors know it, the others are asked.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from lightning_swiftmoe.parallel.communicator import ExchangeError
from lightning_swiftmoe.whereabouts import cut, error_of_main_thread, place_of, place_of_main_thread

MOST_LINES = 30

_MOST_CAUSE_LINES = 20
_LEAST_TRACE_LINES = 6
_MOST_OTHERS = 6
_SIGNS_OF_A_LOST_PEER = ("gloo", "NCCL", "Connection reset", "Connection closed")
_SIGNS_OF_A_TIMEOUT = ("Timed out waiting", "has not finished for")  # of gloo, and of our watchdog
_ASKED = "asked"  # a file that is there once every rank should write down where it is
_ANSWER_S = 2.0
_PERIOD_S = 0.05
_EVERYBODY = (
    "In fit all ranks meet in forwards, collectives and reads of expert Parameters, norms too: every rank has to come "
    "to each of them, so put none behind is_global_zero"
)


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    Args:
        rank: of the job.
        when: seconds since the epoch; infinity where only the end of the process was seen.
        consequence: whether it tells of the failure of another rank.
        text: the traceback, or a sentence.
        message: what ``text`` ends with: type and message of the last exception, or all of it.
        place: where the rank was; empty where nobody knows.
        timed_out: whether it waited for another rank for too long.
    """

    rank: int
    when: float
    consequence: bool
    text: str
    message: str
    place: str = ""
    timed_out: bool = False

    @classmethod
    def of_error(cls, rank: int, error: BaseException) -> Failure:
        """From what was raised, or is about to be said for the main thread, which waits."""
        text = "".join(traceback.format_exception(error)).rstrip()
        message = "".join(traceback.format_exception_only(error)).rstrip()
        timed_out = any(sign in str(cause) for cause in _causes(error) for sign in _SIGNS_OF_A_TIMEOUT)
        return cls(rank, time.time(), _tells_of_another(error), text, message, place_of(error), timed_out)

    @classmethod
    def of_exit(cls, rank: int, code: int) -> Failure:
        """From a process that ended without a word; a negative code is a signal."""
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": out of memory, or somebody killed it" if name == "SIGKILL" else ""
            text = f"rank {rank} was killed by {name}{hint}"
            return cls(rank, float("inf"), False, text, text)
        text = f"rank {rank} ended with exit code {code}"
        return cls(rank, float("inf"), True, text, text)

    @property
    def in_a_line(self) -> str:
        """The error itself, cut to what a terminal shows."""
        return cut(self.message.splitlines()[0] if self.message else "")

    @property
    def in_lines(self) -> list[str]:
        """The end of the traceback, shortened, and the message, which often ends with what to do: never cut."""
        message = self.message.splitlines()
        trace = self.text.removesuffix(self.message).splitlines()
        lines = [cut(line) for line in trace if line.strip(" ^~")]  # without the marks below a line of code
        room = max(_MOST_CAUSE_LINES - len(message), _LEAST_TRACE_LINES)
        if len(lines) > room:
            lines = [lines[0], "  ...", *lines[2 - room :]]
        return [*lines, *message]


class FailureBoard:
    """A folder with one file for each rank of this host that failed.

    Args:
        folder: made by the process the user started; None makes one, which goes when this process ends.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder or tempfile.mkdtemp(prefix="swiftmoe-failures-"))
        if folder is None:
            atexit.register(self.remove)

    def note(self, rank: int, error: BaseException) -> Failure:
        """Write down the first error of this rank; where that fails, the error matters more."""
        failure = Failure.of_error(rank, error)
        self._write(f"{rank}.json", json.dumps(asdict(failure)))
        return failure

    def ask(self, ranks: Iterable[int]) -> None:
        """Let ``ranks`` write down where they are, those that have not failed; they have ``_ANSWER_S`` to do so."""
        self._write(_ASKED, "")
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not all(map(self._is_known, ranks)):
            time.sleep(_PERIOD_S)

    def answer(self, rank: int) -> None:
        """Write down where the main thread of this rank is, if somebody asked. Once, on another thread."""
        if (self.folder / _ASKED).exists() and not self._is_known(rank):
            self._write(f"{rank}.place", _place_of_main_thread())

    def note_common_end(self) -> None:
        """All ranks are about to end as one, and nobody is to blame."""
        self._write("together", "")

    def ends_together(self) -> bool:
        """Whether ``note_common_end`` was called by some rank."""
        return (self.folder / "together").exists()

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
        """The first cause last, ``MOST_LINES`` lines unless its message has many; empty where nobody failed."""
        found = self.failures(exit_codes)
        if not found:
            return ""
        late = [failure for failure in found if failure.timed_out]
        if late and found[0].consequence:
            return "\n".join([*self._of_timeout(), late[0].message, _EVERYBODY])
        first, others = found[0], found[1:]
        lines = [f"rank {other.rank}, as a consequence: {other.in_a_line}" for other in others[:_MOST_OTHERS]]
        if len(others) > _MOST_OTHERS:
            lines.append(f"and {len(others) - _MOST_OTHERS} more ranks")
        lines.append(f"The job ended because of rank {first.rank}:")
        return "\n".join([*lines, *first.in_lines])

    def places(self) -> list[str]:
        """Where ranks were that have failed or answered: a line for each place."""
        known = {failure.rank: failure.place for failure in self.failures({})}
        # Whoever answered was there in time, and may have failed elsewhere later.
        known |= {int(path.stem): path.read_text() for path in self.folder.glob("*.place")}
        ranks: dict[str, list[int]] = {}
        for rank, place in sorted(known.items()):
            ranks.setdefault(place, []).append(rank)
        lines = [f"{_named(some)}: {place}" for place, some in ranks.items()]
        if len(lines) > _MOST_OTHERS:
            lines = [*lines[:_MOST_OTHERS], f"and {len(lines) - _MOST_OTHERS} more places"]
        return lines

    def _of_timeout(self) -> list[str]:
        places = self.places()
        how = "ranks waited for each other in different places" if len(places) > 1 else "ranks waited for others"
        return [f"The job ended by a timeout: {how}:", *places]

    def _is_known(self, rank: int) -> bool:
        return any((self.folder / f"{rank}.{kind}").exists() for kind in ("json", "place"))

    def _write(self, name: str, text: str) -> None:
        """Whole or not at all, and only the first time."""
        path = self.folder / name
        try:
            if not path.exists():
                draft = path.with_name(f"{name}.draft")
                draft.write_text(text)
                draft.rename(path)
        except OSError:
            pass

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
    for cause in _causes(error):
        if isinstance(cause, (ExchangeError, dist.DistError)):
            return True
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _SIGNS_OF_A_LOST_PEER):
            return True
    return False


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _place_of_main_thread() -> str:
    error = error_of_main_thread()
    if error is not None and _tells_of_another(error):  # it waited too, and is about to say so
        return place_of(error)
    return place_of_main_thread()


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
