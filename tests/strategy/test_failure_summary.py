"""What is told of failed ranks: the first cause last, consequences in a line, never many lines."""

import linecache
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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
    message = f"ValueError: {caught.value}".splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines[: -len(message)])) < 240
    assert "and 57 more ranks" in lines
    assert lines[-len(message) :] == message


@pytest.mark.parametrize(
    "message",
    [
        f"{'a dense Parameter got no gradient ' * 20}: set find_unused_parameters=True",
        "\n".join([*["some line of many " * 20] * 40, "", "give one to each: [Adafactor(dense), AdamW(experts)]"]),
    ],
    ids=["long", "many lines"],
)
def test_advice_is_never_cut(board, message):
    error = raised(ValueError(message), raised(KeyError("x" * 1000)))
    error.add_note("and a note")
    board.note(0, error)
    summary = board.summary({})
    assert summary.endswith(f"\nValueError: {message}\nand a note")
    assert "x" * 201 not in summary
    assert "The above exception was the direct cause" in summary or message.count("\n")


def test_of_a_consequence_the_message_begins(board):
    board.note(0, raised(ExchangeError("weight exchange failed\nand more of it")))
    board.note(1, raised(ValueError("bad batch")))
    line = board.summary({}).splitlines()[0]
    assert line == f"rank 0, as a consequence: {ExchangeError.__module__}.ExchangeError: weight exchange failed"


# -- timeouts ----------------------------------------------------------------------------------------------------------

GLOO = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"


def read_alone():
    raise RuntimeError(GLOO)  # p.norm()


def step():
    raise ExchangeError("dispatch exchange failed") from RuntimeError(GLOO)  # self.moe(x)


def place(function, text, file=__file__):
    """As a summary has it."""
    lines = linecache.getlines(file)
    start = function.__code__.co_firstlineno
    number = next(n for n in range(start, len(lines) + 1) if text in lines[n - 1])
    return f"{file}:{number}, in {function.__name__}: {lines[number - 1].strip()}"


def note(board, rank, function):
    with pytest.raises(RuntimeError) as caught:
        function()
    return board.note(rank, caught.value)


def test_of_a_timeout_every_rank_is_told(board):
    assert note(board, 1, step).timed_out
    assert note(board, 0, read_alone).timed_out
    lines = board.summary({0: 1, 1: 1}).splitlines()
    assert lines[:3] == [
        "The job ended by a timeout: ranks waited for each other in different places:",
        f"rank 0: {place(read_alone, 'p.norm()')}",
        f"rank 1: {place(step, 'self.moe(x)')}",
    ]
    assert lines[3].endswith("ExchangeError: dispatch exchange failed")
    assert "is_global_zero" in lines[4]


def test_ranks_in_one_place_share_a_line(board):
    for rank in range(64):
        note(board, rank, read_alone if rank == 5 else step)
    lines = board.summary({}).splitlines()
    assert lines[1] == f"ranks {', '.join(str(rank) for rank in range(64) if rank != 5)}: {place(step, 'self.moe(x)')}"
    assert lines[2] == f"rank 5: {place(read_alone, 'p.norm()')}"


def test_an_error_of_the_users_goes_before_a_timeout(board):
    assert note(board, 0, step).timed_out
    board.note(1, raised(ValueError("bad batch")))
    lines = board.summary({}).splitlines()
    assert "The job ended because of rank 1:" in lines
    assert lines[-1] == "ValueError: bad batch"


def test_a_lost_connection_is_no_timeout(board):
    board.note(0, raised(ExchangeError("Connection closed by peer")))
    assert "The job ended because of rank 0:" in board.summary({})


def test_ranks_that_have_not_failed_are_asked(board):
    board.answer(1)  # nobody asked
    assert board.places() == []
    note(board, 0, read_alone)
    done = threading.Event()

    def answer():
        while not done.wait(0.01):
            board.answer(1)

    thread = threading.Thread(target=answer)
    thread.start()
    board.ask([0, 1])  # as a main thread that is somewhere
    done.set()
    thread.join()
    assert board.places() == [
        f"rank 0: {place(read_alone, 'p.norm()')}",
        f"rank 1: {place(test_ranks_that_have_not_failed_are_asked, 'as a main thread that')}",
    ]
    # What it fails with afterwards is a consequence.
    note(board, 1, step)
    assert "as a main thread that" in board.places()[1]


def asked(board, rank):
    board.ask([])
    board.answer(rank)


def test_who_is_about_to_fail_tells_where_it_waited(board):
    """Asked between its error and its note, a rank is somewhere in what Lightning does on an exception."""
    note(board, 0, read_alone)
    with ThreadPoolExecutor(1) as pool:
        try:
            step()
        except ExchangeError:
            pool.submit(asked, board, 1).result()
    assert board.places()[1] == f"rank 1: {place(step, 'self.moe(x)')}"


def test_who_handles_an_error_of_its_own_is_where_it_is(board):
    note(board, 0, read_alone)
    with ThreadPoolExecutor(1) as pool:
        try:
            raise KeyError("of the user's")
        except KeyError:
            pool.submit(asked, board, 1).result()  # behind its error
    here = place(test_who_handles_an_error_of_its_own_is_where_it_is, "# behind its error")
    assert board.places()[1] == f"rank 1: {here}"


def test_an_error_that_was_not_raised_is_the_main_threads(board):
    failure = board.note(0, ExchangeError("weight exchange has not finished for 9 s"))  # said by a watchdog
    assert failure.timed_out
    this = place(test_an_error_that_was_not_raised_is_the_main_threads, "said by a watchdog")
    assert board.places() == [f"rank 0: {this}"]


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
