"""Writing while training goes on: one piece of work at a time, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs work in a thread. What fails there is raised by the next ``finish``."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work``. Call ``finish`` before."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="swiftmoe-checkpoint", daemon=True)
        self._thread.start()

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do ``work`` when what was started has succeeded; at once if there is nothing."""
        if self._thread is None:
            work()
        else:
            self._afterwards.append(work)

    def finish(self) -> None:
        """Wait.

        Raises:
            Exception: what the work raised.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        later, self._afterwards = self._afterwards, []
        if error is not None:
            raise error
        for work in later:
            work()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
