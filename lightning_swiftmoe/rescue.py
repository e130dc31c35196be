"""Ranks that are left when one is gone agree on a step, and save it from memory.

Each rank holds a lock on a file of its own, which the system takes away when the process dies, however it dies. A
thread of each rank looks at the lock of the next one. Where it is free and its rank has not said that it leaves, or
somebody else has seen such a lock, training is over: the thread, and not the main thread, which may wait for the dead
rank forever, writes down how many steps this rank has taken, waits until everybody else is either heard of or gone,
takes the step that others have taken already, and puts what this rank holds into the folder. The first of them makes a
checkpoint of it all. Then the process ends.

A step is taken by all or by none. Ranks vote when they have all that the step needs; who has heard all votes takes it,
and then everybody that is left has voted, and can take it too. What a user does between two steps is part of the first:
the thread waits until the main thread is at the head of the next, where it stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

T = TypeVar("T")

EXIT_CODE = 75  # of ranks that were left, once all is saved: try again, in the words of sysexits.h
_RANKS = ".ranks"
_PERIOD_S = 0.1
_SOON_S = 2.0  # between the end of a rank's connections and that of its lock; for what hooks do between two steps
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Standing:
    """What a rank that is left says of itself.

    Args:
        steps: optimizer steps taken since the fit began.
        voted: whether it has all that the next one needs.
    """

    steps: int
    voted: bool


@dataclass(frozen=True)
class Survivors:
    """What the ranks that are left agree on.

    Args:
        ranks: of them, in order.
        steps: taken by all of them.
        files: what each of them holds, once it is there.
    """

    ranks: tuple[int, ...]
    steps: int
    files: dict[int, Path]


class Rescue:
    """This rank's part.

    Args:
        folder: of the job; emptied of what an earlier one left by ``prepare``.
        rank: of the job.
        num_ranks: of the job.
        held: gives what this rank holds, to be saved by ``torch.save``.
        save: makes a checkpoint of what all have; on the first rank that is left.
        tell: hears, in a line, what was done, before this process ends.
        aside: around all that the thread does of it.
        stuck: why the thread will not end what it does; None: it may.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        num_ranks: int,
        held: Callable[[], Any],
        save: Callable[[Survivors], Path],
        tell: Callable[[str], None],
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
        stuck: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._folder = folder / _RANKS
        self._rank, self._num_ranks = rank, num_ranks
        self._held, self._save, self._tell = held, save, tell
        self._aside, self._stuck = aside, stuck
        self._steps = 0
        self._unfinished: Callable[[], Any] | None = None
        self._stepping = threading.Lock()
        self._in_step = threading.Event()  # and not in hooks between two, which may edit what is held
        self._began = threading.Event()
        self._gave_up = threading.Event()
        self._stops = threading.Event()
        self._lock: IO[str] | None = None
        self._thread = threading.Thread(target=self._watch, name="swiftmoe-rescue", daemon=True)

    @staticmethod
    def prepare(folder: Path) -> None:
        """Once, before any rank starts."""
        ranks = folder / _RANKS
        ranks.mkdir(parents=True, exist_ok=True)
        for path in ranks.iterdir():
            path.unlink()

    def hold(self) -> None:
        """Take this rank's lock; all ranks do before any of them watches."""
        self._lock = self._file("lock").open("w")
        fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def watch(self) -> None:
        """From now on."""
        self._thread.start()

    def leave(self) -> None:
        """The fit ends here, well or with an error of this rank: nobody should take it for a death."""
        if self._lock is None:
            return
        self._file("left").touch()
        self._stops.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._lock.close()
        self._lock = None

    @property
    def steps(self) -> int:
        """Taken since the fit began."""
        return self._steps

    def begin_step(self) -> None:
        """Whatever comes between two steps is over. Does not return where training is."""
        self._in_step.set()
        if self._began.is_set():
            threading.Event().wait()

    def commit(self, vote: Callable[[], Any], step: Callable[[], T]) -> T:
        """Take a step on all ranks or on none.

        Args:
            vote: returns when all ranks have called it.
            step: needs no other rank.
        """
        self._unfinished = step
        vote()
        with self._stepping:
            if self._began.is_set():
                threading.Event().wait()  # the thread has said how far this rank is
            result = step()
            self._steps += 1
            self._unfinished = None
            self._in_step.clear()
        return result

    def wait_if_ranks_are_lost(self) -> None:
        """An error came up. Does not return where it is that of a lost rank, and those left can go on.

        For any thread but the one that saves.
        """
        if self._lock is None:
            return
        deadline = time.monotonic() + _SOON_S
        while not self._began.wait(_PERIOD_S):
            if time.monotonic() > deadline:
                return
        while not self._gave_up.wait(_PERIOD_S):
            reason = self._stuck()
            if reason is not None:
                self._tell(self._cannot_save(reason))
                self._gave_up.set()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        following = (self._rank + 1) % self._num_ranks
        while not self._stops.wait(_PERIOD_S):
            if self._is_lost(following) or self._alarm.exists():
                with self._stepping:
                    self._began.set()
                    steps, unfinished = self._steps, self._unfinished
                try:
                    self._alarm.touch()
                    self._in_step.wait(_SOON_S)  # in vain where a hook waits for the rank that is gone
                    with self._aside():
                        self._go(steps, unfinished)
                except Exception as error:
                    self._tell(self._cannot_save(f"{type(error).__name__}: {error}"))
                self._file("left").touch()
                self._gave_up.set()
                return

    def _go(self, steps: int, unfinished: Callable[[], Any] | None) -> None:
        self._write("met", json.dumps(asdict(Standing(steps, unfinished is not None))))
        met = self._everybody_left()
        most = max(standing.steps for standing in met.values())
        if steps < most:
            if unfinished is None:
                raise RuntimeError(f"others have taken {most} steps, and this rank could take {steps} only")
            unfinished()
        path = self._file("part")
        torch.save(self._held(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        first = min(met)
        if self._rank == first:
            files = {rank: self._file("part", rank) for rank in met}
            for rank, file in files.items():
                self._wait(file.exists, f"what rank {rank} holds", rank)
            saved = self._save(Survivors(tuple(sorted(met)), most, files))
            self._write("saved", str(saved))
            for file in files.values():
                file.unlink()
            lost = sorted(set(range(self._num_ranks)) - set(met))
            self._tell(f"rank(s) {lost} are gone: those left have saved {saved}")
        else:
            self._wait(self._file("saved", first).exists, f"rank {first} to save", first)
        os._exit(EXIT_CODE)

    def _cannot_save(self, reason: str) -> str:
        return f"rank {self._rank} cannot save what it holds: {reason}"

    def _everybody_left(self) -> dict[int, Standing]:
        """Every other rank is heard of, or gone."""

        for rank in range(self._num_ranks):
            self._wait(partial(self._is_known, rank), f"rank {rank}")
        met = {rank: self._file("met", rank) for rank in range(self._num_ranks)}
        return {rank: Standing(**json.loads(file.read_text())) for rank, file in met.items() if file.exists()}

    def _wait(self, until: Callable[[], bool], what: str, whom: int | None = None) -> None:
        """Until something is there, which ``whom``, if anybody, puts there before it ends."""
        deadline = time.monotonic() + _PATIENCE_S
        while not until():
            if whom is not None and self._is_over(whom) and not until():
                raise RuntimeError(f"waited for {what}, and it has ended")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what} for {_PATIENCE_S:.0f} s")
            time.sleep(_PERIOD_S / 10)

    def _is_known(self, rank: int) -> bool:
        return self._file("met", rank).exists() or self._is_over(rank)

    @property
    def _alarm(self) -> Path:
        """There as soon as one rank knows that another is lost."""
        return self._folder / "alarm"

    def _is_lost(self, rank: int) -> bool:
        """Whether its process is gone without a word."""
        # In this order: it may say so and end in between.
        return not self._is_alive(rank) and not self._file("left", rank).exists()

    def _is_over(self, rank: int) -> bool:
        return self._file("left", rank).exists() or not self._is_alive(rank)

    def _is_alive(self, rank: int) -> bool:
        with self._file("lock", rank).open() as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def _file(self, kind: str, rank: int | None = None) -> Path:
        return self._folder / f"{kind}-{self._rank if rank is None else rank}"

    def _write(self, kind: str, text: str) -> None:
        """Whole or not at all."""
        path = self._file(kind)
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").rename(path)


def rescued_ranks(folder: Path) -> int:
    """How many ranks were left when one was lost, and saved a checkpoint; 0 where they did not."""
    ranks = folder / _RANKS
    return len(list(ranks.glob("met-*[0-9]"))) if any(ranks.glob("saved-*[0-9]")) else 0
