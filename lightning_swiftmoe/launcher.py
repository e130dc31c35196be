"""Starting ranks as Lightning does, and telling at the end which of them failed first.

Lightning's own observer kills the process the user started, without a word, some seconds after another rank ended.

A rank that waits in an exchange on its host runs no handler of a signal until the wait is over: Python calls handlers
on the main thread only, between two of its own instructions. SIGTERM is noted then, and all ranks end at the head of
the next step. Where they do not come so far, a second SIGTERM to the process that started them ends them at once: that
process hears of it on another thread, or has nothing else to do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.multiprocessing import ProcessExitedException
from typing_extensions import override

from lightning_swiftmoe._compat import (
    MultiProcessingLauncher,
    SIGTERMException,
    SubprocessScriptLauncher,
    end_fit,
    set_num_threads,
)
from lightning_swiftmoe.failures import FailureBoard, show_instead
from lightning_swiftmoe.parallel.meta_start import make_room

_FOLDER = "SWIFTMOE_FAILURES"
_GRACE_S = 5.0  # as long as Lightning gives the first process to end by itself
_PERIOD_S = 0.2
_SAME_S = 1.0  # a SIGTERM that follows sooner is the same one: shells and schedulers pass it on as well
SIGNAL_EXIT = 128  # plus the signal's number: how ranks end that a signal ends together, as shells say it


class ScriptLauncher(SubprocessScriptLauncher):
    """Runs the user's script once more for each further rank of this host, and watches them.

    Ranks that somebody else started are left alone.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Only for this process: whatever it starts by itself is no rank.
        folder = os.environ.pop(_FOLDER, None)
        self._parent = os.getppid() if folder is not None else None
        self._board = FailureBoard(folder) if folder is not None else None
        self.before_leaving: Callable[[], None] | None = None
        self._telling = threading.Lock()
        self._told = False
        self._together = False
        self._signals: _ArrivedSignals | None = None
        self._sigterms = _Repeated()

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self._sigterms = _Repeated()
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._start_children()
        if self._parent is not None:
            threading.Thread(target=self._end_with_parent, name="swiftmoe-orphan", daemon=True).start()
        set_num_threads(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def failed(self, rank: int, error: BaseException) -> None:
        """This rank raised ``error``: write it down, and see that it is told once."""
        if self._board is not None:
            _note(self._board, rank, error, self._ranks)
            show_instead(error, self._tell if self._parent is None else self._leave_to_parent)

    def ends_now(self, rank: int, error: BaseException) -> None:
        """As ``failed``, for a process that will not reach the end of its program."""
        if self._board is not None:
            _note(self._board, rank, error, self._ranks)
            if self._parent is None:
                self._tell()

    def ends_together(self) -> None:
        """All ranks are about to end as one, with an exit code above 128, and none is to blame."""
        self._together = True

    @property
    def _ranks(self) -> range:
        """Of this host."""
        first = self.cluster_environment.node_rank() * self.num_processes
        return range(first, first + self.num_processes)

    def _answer(self) -> None:
        if self._board is not None:
            self._board.answer(self._ranks[self.cluster_environment.local_rank()])

    def _start_children(self) -> None:
        if self.num_processes == 1:
            self._call_children_scripts()
            return
        self._board = self._board or FailureBoard()
        os.environ[_FOLDER] = str(self._board.folder)
        try:
            self._call_children_scripts()
        finally:
            del os.environ[_FOLDER]
        if threading.current_thread() is threading.main_thread():
            self._signals = _ArrivedSignals()
        threading.Thread(target=self._observe, name="swiftmoe-observer", daemon=True).start()

    def _observe(self) -> None:
        """End this process where another rank failed and it does not end by itself, or where it is told so twice."""
        codes = [process.poll() for process in self.procs]
        while not any(map(self._is_failure, codes)):
            if None not in codes:
                self._forget()
                return
            if self._is_told_again() and not self._together:
                self._end_now()
            self._answer()
            time.sleep(_PERIOD_S)
            codes = [process.poll() for process in self.procs]
        time.sleep(_GRACE_S)
        if self.before_leaving is not None:
            self.before_leaving()
        self._tell()
        os._exit(1)

    def _is_failure(self, code: int | None) -> bool:
        if code is None or code == 0:
            return False
        return not (self._together and code > SIGNAL_EXIT)

    def _is_told_again(self) -> bool:
        return self._signals is not None and signal.SIGTERM in self._signals.take() and self._sigterms.again()

    def _end_now(self) -> None:
        """Ranks are somewhere, and need not wait until they are through."""
        with self._telling:
            if self._board is not None and not self._told:
                self._board.ask([])
                self._answer()  # the thread that does so for this process is this one
                _print_places_and_remove(self._board, self._ranks)
        for process in self.procs:
            process.kill()
        os._exit(SIGNAL_EXIT + signal.SIGTERM)

    def _end_with_parent(self) -> None:
        """End this rank where the first one is gone and it does not end by itself: it may wait for it on a device."""
        while os.getppid() == self._parent:
            self._answer()
            time.sleep(_PERIOD_S)
        time.sleep(_GRACE_S)
        if self.before_leaving is not None:
            self.before_leaving()
        sys.stderr.write("the process that started this rank is gone: this one ends too\n")
        sys.stderr.flush()
        os._exit(1)

    def _leave_to_parent(self) -> bool:
        """Whether the process that tells is still there."""
        return os.getppid() == self._parent

    def _tell(self) -> bool:
        """Print the summary, whichever thread comes first."""
        with self._telling:
            if not self._told and self._board is not None:
                self._told = True
                _print_and_remove(self._board, self._end_children())
            return self._told

    def _forget(self) -> None:
        with self._telling:
            if self._board is not None:
                self._board.remove()
            self._board = None

    def _end_children(self) -> dict[int, int]:
        """Give other ranks a moment to write down their errors; exit codes of those that ended by themselves."""
        deadline = time.monotonic() + _GRACE_S / 2
        while time.monotonic() < deadline and any(process.poll() is None for process in self.procs):
            time.sleep(_PERIOD_S)
        codes = {rank: process.poll() for rank, process in zip(self._ranks[1:], self.procs, strict=True)}
        for process in self.procs:
            process.kill()
            process.wait()
        return {rank: code for rank, code in codes.items() if code is not None}


class ForkLauncher(MultiProcessingLauncher):
    """Forks or spawns the ranks; the process the user started only waits for them."""

    _board: FailureBoard | None = None
    _main: int | None = None
    _first: int | None = None  # the process that ended before any other
    before_leaving: Callable[[], None] | None = None  # of a rank, by an error

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self._board, self._main = FailureBoard(), os.getpid()
        with self._signals_passed_on():
            try:
                result = super().launch(function, *args, trainer=trainer, **kwargs)
            except ProcessExitedException as error:
                if error.exit_code <= SIGNAL_EXIT:
                    raise
                self._board.remove()
                raise SIGTERMException(error.exit_code) from None
        self._board.remove()
        return result

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Ranks end by themselves, at the end of a step: a terminal's Ctrl+C reaches them too, a SIGTERM does not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        sigterms = _Repeated()

        def pass_on(signum: int, _: FrameType | None) -> None:
            if os.getpid() != self._main:
                return
            assert self._board is not None
            if sigterms.again() and not self._board.ends_together():
                self._end_now()
            self.kill(signum)

        def wait_for_ranks(signum: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, wait_for_ranks)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _end_now(self) -> None:
        """Ranks are somewhere, and need not wait until they are through."""
        assert self._board is not None
        _print_places_and_remove(self._board, self._ranks)
        for process in self.procs:
            process.kill()
            process.join()
        raise SIGTERMException(SIGNAL_EXIT + signal.SIGTERM)

    @override
    def _collect_rank_zero_results(self, trainer: Any, results: Any) -> Any:
        # The process that waits has no part of experts that were built on the meta device.
        self._strategy.gather_experts()  # type: ignore[attr-defined]
        return super()._collect_rank_zero_results(trainer, results)

    @override
    def _recover_results_in_main_process(self, worker_output: Any, trainer: Any) -> None:
        make_room(trainer.lightning_module)
        super()._recover_results_in_main_process(worker_output, trainer)

    def failed(self, rank: int, error: BaseException) -> None:
        """The user's own process has heard, by ``error``, that some rank failed."""
        if os.getpid() == self._main:
            self._first = getattr(error, "error_index", None)
            show_instead(error, self._tell)

    def is_ending(self) -> bool:
        """Whether some rank has failed: a SIGTERM is torch's then, for ranks that may be stuck."""
        return self._board is not None and self._board.has_notes()

    def ends_now(self, rank: int, error: BaseException) -> None:
        """This rank will not reach the end of its program."""
        if self._board is not None:
            _note(self._board, rank, error, self._ranks)

    def ends_together(self) -> None:
        """As of ``ScriptLauncher``."""
        if self._board is not None:
            self._board.note_common_end()

    @override
    def _wrapping_function(self, process_idx: int, trainer: Any, *args: Any, **kwargs: Any) -> None:
        # What the first process does on a signal is no rank's business.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rank = self._ranks[process_idx]
        threading.Thread(target=self._answer, args=(rank,), name="swiftmoe-answers", daemon=True).start()
        try:
            super()._wrapping_function(process_idx, trainer, *args, **kwargs)
        except SIGTERMException as error:
            end_fit(trainer, error)
            raise
        except BaseException as error:
            if self.before_leaving is not None:
                self.before_leaving()
            # Lightning's handler talks to the other ranks, which are about to end.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            assert self._board is not None
            _note(self._board, rank, error, self._ranks)
            raise

    def _answer(self, rank: int) -> None:
        assert self._board is not None
        while True:
            self._board.answer(rank)
            time.sleep(_PERIOD_S)

    @property
    def _ranks(self) -> range:
        """Of this host."""
        strategy: Any = self._strategy
        first = strategy.node_rank * strategy.num_processes
        return range(first, first + strategy.num_processes)

    def _tell(self) -> bool:
        assert self._board is not None
        # Torch ends the others, by SIGTERM and then by SIGKILL.
        first = {} if self._first is None else {self._ranks[self._first]: self.procs[self._first].exitcode}
        ended = {rank: code for rank, code in first.items() if code is not None}
        return _print_and_remove(self._board, ended)


def _print_and_remove(board: FailureBoard, codes: Mapping[int, int]) -> bool:
    text = board.summary(codes)
    board.remove()
    if text:
        print(text, file=sys.stderr, flush=True)
    return bool(text)


def _print_places_and_remove(board: FailureBoard, ranks: range) -> None:
    """Where ranks were that did not come to the end of a step."""
    board.ask(ranks)
    places = board.places()
    board.remove()
    print("SIGTERM came again, and ranks had not ended a step together. Where they were:", file=sys.stderr)
    print(*places, sep="\n", file=sys.stderr, flush=True)


def _note(board: FailureBoard, rank: int, error: BaseException, ranks: range) -> None:
    """Write down why ``rank`` ends; who waited too long lets the others of ``ranks`` say where they are."""
    if board.note(rank, error).timed_out:
        board.ask(ranks)


class _Repeated:
    """Tells a signal that comes again from one that comes twice."""

    def __init__(self) -> None:
        self._first: float | None = None

    def again(self) -> bool:
        """Take note of one: whether another came well before it."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > _SAME_S


class _ArrivedSignals:
    """Signals with a handler that reached this process, also those whose handler waits for the main thread.

    Made on the main thread, and for good. Where somebody else listens already, as asyncio does, nothing is heard.
    """

    def __init__(self) -> None:
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._reads, False)
        os.set_blocking(self._writes, False)
        before = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
        os.register_at_fork(after_in_child=self._leave)

    def take(self) -> bytes:
        """Their numbers, since the last call."""
        try:
            return os.read(self._reads, 4096)
        except BlockingIOError:
            return b""

    def _leave(self) -> None:
        """Signals of a forked child, such as a worker that loads data, are not ours."""
        with suppress(ValueError):
            current = signal.set_wakeup_fd(-1)
            if current != self._writes:
                signal.set_wakeup_fd(current)
