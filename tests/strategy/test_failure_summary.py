"""What is told of failed ranks: the first cause last, consequences in a line, never many lines."""

import signal
import sys

import pytest
import torch.distributed as dist

from lightning_swiftmoe.failures import MOST_LINES, FailureBoard, show_instead
from lightning_swiftmoe.parallel.communicator import ExchangeError


@pytest.fixture
def board(tmp_path):
    return FailureBoard(str(tmp_path))


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_an_error_goes_before_what_it_causes_elsewhere(board):
    board.note(0, raised(ExchangeError("weight exchange failed")))
    board.note(1, raised(ValueError("bad batch")))
    lines = board.summary({}).splitlines()
    assert lines[0].endswith("ExchangeError: weight exchange failed")
    assert lines[0].startswith("rank 0, as a consequence: ")
    assert lines[1] == "The job ended because of rank 1:"
    assert lines[-1] == "ValueError: bad batch"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        dist.DistBackendError("NCCL error"),
        raised(RuntimeError("in the backward"), ExchangeError("lost")),
    ],
)
def test_lost_connections_are_consequences_of_a_signal(board, error):
    board.note(0, raised(error, error.__cause__))
    lines = board.summary({1: -signal.SIGKILL}).splitlines()
    assert lines[-2:] == [
        "The job ended because of rank 1:",
        "rank 1 was killed by SIGKILL: out of memory, or somebody killed it",
    ]


def test_of_two_errors_the_earlier_is_the_cause(board):
    board.note(3, raised(ValueError("first")))
    board.note(0, raised(KeyError("second")))
    board.note(3, raised(ValueError("of the same rank, while it ended")))
    assert board.summary({3: 1, 0: 1}).splitlines()[-1] == "ValueError: first"


def deep(depth):
    if depth:
        deep(depth - 1)
    raise ValueError("\n".join(f"line {number} {'x' * 500}" for number in range(12)))


def deeper(depth):
    # Alternating names: Python itself would fold a recursion.
    return deepest(depth - 1) if depth else deep(0)


def deepest(depth):
    return deeper(depth - 1) if depth else deep(0)


def test_many_ranks_and_long_tracebacks_stay_within_a_screen(board):
    for rank in range(64):
        with pytest.raises(ValueError) as caught:
            deeper(40)
        board.note(rank, caught.value)
    lines = board.summary({}).splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) < 240
    assert "and 57 more ranks" in lines
    assert lines[-1].startswith("line 11")


def test_nobody_failed(board):
    assert board.summary({1: 0}) == ""


def test_a_folder_that_is_gone_hides_no_error(board):
    board.remove()
    board.note(0, raised(ValueError("bad batch")))
    assert board.summary({}) == ""


def test_only_the_failure_of_the_fit_is_told_otherwise(monkeypatch):
    usual, told = [], []
    monkeypatch.setattr(sys, "excepthook", lambda kind, value, trace: usual.append(value))
    ours, other = ValueError("in fit"), ValueError("after fit")
    show_instead(ours, lambda: told.append(ours) or True)
    sys.excepthook(ValueError, ours, None)
    sys.excepthook(ValueError, other, None)
    assert (told, usual) == ([ours], [other])
    show_instead(ours, lambda: False)
    sys.excepthook(ValueError, ours, None)
    assert told == [ours, ours]
