"""An exchange that never finishes ends the process with one line; one that finishes late does not."""

import subprocess
import sys
import textwrap
import time
import weakref

import pytest

from lightning_swiftmoe.parallel.watchdog import EXIT_CODE, Watchdog


class FakeEvent:
    def __init__(self, passed=False):
        self.passed = passed
        self.queries = 0

    def query(self):
        self.queries += 1
        return self.passed


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def watchdog(clock, lines):
    return Watchdog(600, 1, 2, lines.append, clock)


def test_the_oldest_exchange_is_named(watchdog, clock, lines):
    watchdog.watch("dispatch", "moes.0", FakeEvent(passed=True))
    clock.now = 5
    watchdog.watch("weight", "moes.1.experts", FakeEvent())
    clock.now = 10
    watchdog.watch("gradient", "moes.0.experts", FakeEvent())
    clock.now = 602
    watchdog.look()
    assert not lines
    clock.now = 604
    watchdog.look()
    assert len(lines) == 1
    assert lines[0].startswith("weight exchange of layer 'moes.1.experts' on rank 1 of 2 has not finished for 599 s")
    assert "\n" not in lines[0]


def test_an_exchange_that_finishes_is_forgotten(watchdog, clock, lines):
    events = [FakeEvent() for _ in range(3)]
    for event in events:
        watchdog.watch("weight", "moe", event)
    clock.now = 500
    events[0].passed = events[1].passed = events[2].passed = True
    watchdog.look()
    clock.now = 5000
    watchdog.look()
    assert not lines
    assert [event.queries for event in events] == [1, 1, 1]


def test_a_step_asks_nothing(watchdog):
    event = FakeEvent()
    watchdog.watch("weight", "moe", event)
    assert event.queries == 0


def test_only_the_oldest_is_asked(watchdog):
    events = [FakeEvent() for _ in range(1000)]
    for event in events:
        watchdog.watch("weight", "moe", event)
    watchdog.look()
    assert sum(event.queries for event in events) == 1


def test_events_are_destroyed_by_who_starts_exchanges(watchdog):
    # Where the main thread waits in the driver, the thread that looks would wait there too, and nobody would look.
    event = FakeEvent(passed=True)
    alive = weakref.ref(event)
    watchdog.watch("weight", "moe", event)
    del event
    watchdog.look()
    assert alive() is not None
    watchdog.watch("weight", "moe", FakeEvent())
    assert alive() is None


def test_nothing_is_watched_after_the_end(watchdog, clock, lines):
    watchdog.watch("weight", "moe", FakeEvent())
    watchdog.close()
    clock.now = 5000
    watchdog.look()
    assert not lines


SCRIPT = """
import threading
from lightning_swiftmoe.parallel.watchdog import Watchdog

class Never:
    def query(self):
        return False

watchdog = Watchdog(1, 0, 4)
watchdog.start()
watchdog.watch("combine", "blocks.3.moe", Never())
threading.Event().wait()  # as a rank that waits for its device
"""


def test_the_process_ends_with_one_line():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - began < 50
    assert done.returncode == EXIT_CODE
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("combine exchange of layer 'blocks.3.moe' on rank 0 of 4 has not finished for 1 s")


def test_the_process_ends_even_where_it_cannot_be_told():
    code = "from lightning_swiftmoe.parallel.watchdog import end_process; end_process('hangs', lambda line: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (EXIT_CODE, "hangs\n")
