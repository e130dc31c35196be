"""Ranks that are left agree on a step, whatever the one that is gone had told to whom."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_swiftmoe.rescue import EXIT_CODE, Rescue, rescued_ranks

CONTEXT = multiprocessing.get_context("fork")


class Rank:
    """Counts its steps, and holds their number."""

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self.folder, self.rank, self.count = folder, rank, 0
        self.reason = None
        self.rescue = Rescue(folder, rank, num_ranks, self.held, self.save, self.told, stuck=lambda: self.reason)

    def step(self) -> None:
        self.count += 1

    def held(self):
        return self.count

    def save(self, survivors):
        counts = [torch.load(file, weights_only=True) for file in survivors.files.values()]
        path = self.folder / "saved.txt"
        path.write_text(f"{survivors.ranks} {survivors.steps} {counts}")
        return path

    def told(self, line):
        (self.folder / f"told-by-{self.rank}.txt").write_text(line)


def work(folder, rank, num_ranks, ready, does):
    mine = Rank(folder, rank, num_ranks)
    mine.rescue.hold()
    ready.wait()
    mine.rescue.watch()
    mine.rescue.begin_step()
    mine.rescue.commit(lambda: None, mine.step)
    if does is not edits_between_steps:
        mine.rescue.begin_step()
    does(mine)


def run(folder, *does):
    """Exit codes of ranks, each of which takes a step and does what it is told."""
    Rescue.prepare(folder)
    ready = CONTEXT.Barrier(len(does))
    ranks = [
        CONTEXT.Process(target=work, args=(folder, rank, len(does), ready, what)) for rank, what in enumerate(does)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    return [rank.exitcode for rank in ranks]


def dies(mine):
    os.kill(os.getpid(), signal.SIGKILL)


def waits_forever(*_):
    threading.Event().wait()


def takes_another(mine):
    mine.rescue.commit(lambda: None, mine.step)
    mine.rescue.begin_step()
    waits_forever()


def edits_between_steps(mine):
    """The rank next to it is lost, and its own thread knows; which would have saved long ago if it did not wait."""
    ranks = mine.folder / ".ranks"
    appears(ranks / "alarm", 30)
    appears(ranks / f"part-{mine.rank}", 1)
    mine.count = 100
    mine.rescue.begin_step()


def appears(path, within_s):
    deadline = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < deadline:
        threading.Event().wait(0.01)


def hears_no_vote(mine):
    """Its own vote is on its way; that of the rank which dies never comes."""
    mine.rescue.commit(waits_forever, mine.step)


def fails_for_want_of_a_rank(mine):
    mine.rescue.wait_if_ranks_are_lost()


def leaves(mine):
    mine.rescue.leave()


SAVED = EXIT_CODE
KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ((waits_forever, dies, waits_forever), "(0, 2) 1 [1, 1]"),
        ((dies, waits_forever, fails_for_want_of_a_rank), "(1, 2) 1 [1, 1]"),
        # Somebody has taken the second step: all do.
        ((takes_another, dies, hears_no_vote), "(0, 2) 2 [2, 2]"),
        ((hears_no_vote, dies, takes_another), "(0, 2) 2 [2, 2]"),
        # Nobody has: nobody does.
        ((hears_no_vote, dies, hears_no_vote), "(0, 2) 1 [1, 1]"),
        ((dies, dies, waits_forever), "(2,) 1 [1]"),
        # What a user does between two steps is part of the first.
        ((edits_between_steps, dies, waits_forever), "(0, 2) 1 [100, 1]"),
    ],
)
def test_those_left_agree(tmp_path, does, said):
    codes = run(tmp_path, *does)
    assert codes == [KILLED if what is dies else SAVED for what in does]
    assert (tmp_path / "saved.txt").read_text() == said
    assert rescued_ranks(tmp_path) == codes.count(SAVED)
    assert not list(tmp_path.glob(".ranks/part-*"))
    lost = [rank for rank, what in enumerate(does) if what is dies]
    (told,) = tmp_path.glob("told-by-*.txt")
    assert told.read_text() == f"rank(s) {lost} are gone: those left have saved {tmp_path / 'saved.txt'}"


def test_who_leaves_is_not_lost(tmp_path):
    assert run(tmp_path, leaves, leaves) == [0, 0]
    assert rescued_ranks(tmp_path) == 0
    assert not list(tmp_path.glob("*.txt"))


def test_an_error_of_its_own_is_told_soon(tmp_path):
    """Nobody is lost: the error goes its way."""
    assert run(tmp_path, lambda mine: (fails_for_want_of_a_rank(mine), leaves(mine)), leaves) == [0, 0]


def test_a_step_that_nobody_can_take(tmp_path):
    """It has not voted, and yet another has gone on: that is no state to save, and the process ends with an error."""

    def has_not_voted(mine):
        mine.rescue.wait_if_ranks_are_lost()
        os._exit(3)

    codes = run(tmp_path, takes_another_and_fails, dies, has_not_voted)
    assert codes == [3, KILLED, 3]
    assert rescued_ranks(tmp_path) == 0
    assert "others have taken 2 steps, and this rank could take 1 only" in (tmp_path / "told-by-2.txt").read_text()


def takes_another_and_fails(mine):
    mine.rescue.commit(lambda: None, mine.step)
    mine.rescue.wait_if_ranks_are_lost()
    os._exit(3)


def test_a_thread_that_is_stuck_is_waited_for_until_it_says_so(tmp_path):
    """What it holds cannot be read: the process ends with its error all the same."""

    def cannot_read(mine):
        mine.rescue.wait_if_ranks_are_lost()
        os._exit(3)

    def starts_to_read(self):
        self.reason = "it waits for the device"
        waits_forever()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rank, "held", starts_to_read)
        codes = run(tmp_path, cannot_read, dies)
    assert codes == [3, KILLED]
    assert (tmp_path / "told-by-0.txt").read_text() == "rank 0 cannot save what it holds: it waits for the device"
