"""What the GPU tests stand on, tried on the host: ranks that stay alive, and the reading of a trace."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.gpu.cases import GpuJob, fit, fit_alone
from tests.gpu.rank_pool import RankPool
from tests.gpu.waits import WINDOW, Quiet, Wait, profiled, waits_in
from tests.jobs import largest_error

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def hosts():
    pool = RankPool(2, "cpu")
    yield pool
    pool.stop()


def total(number):
    tensor = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(tensor)
    return dist.get_rank(), float(tensor)


def fail_on_one(how):
    if dist.get_rank() == 1:
        if how == "raises":
            raise ArithmeticError("no number")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    dist.barrier()


def test_results_come_in_rank_order_from_the_same_processes(hosts):
    assert hosts.run(total, 1) == [(0, 3.0), (1, 3.0)]
    assert hosts.run(os.getpid) == hosts.run(os.getpid)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1: (.|\n)*ArithmeticError: no number"),
        ("dies", "rank 1: died with exit code -9"),
        ("sleeps", "rank 1: no answer after 2 s"),
    ],
)
def test_a_failure_is_named_and_the_ranks_start_anew(hosts, how, message):
    before = hosts.run(os.getpid)
    with pytest.raises(RuntimeError, match=message):
        hosts.run(fail_on_one, how, timeout_s=2 if how == "sleeps" else 60)
    assert hosts.run(total, 0) == [(0, 1.0), (1, 1.0)]
    assert not set(hosts.run(os.getpid)) & set(before)


def test_a_fit(hosts):
    alone = hosts.run(fit_alone, GpuJob())[0]
    for outcome in hosts.run(fit, GpuJob()):
        assert largest_error(outcome.weights, alone.weights) < 1e-5
        assert len(outcome.steps) == GpuJob.steps


@pytest.mark.slow
def test_a_profile_of_three_steps(hosts):
    waits, num_events = hosts.run(profiled, GpuJob(module=Quiet, steps=18))[0]
    assert waits == []
    assert num_events > 100


def event(name, ts, dur, cat="cuda_runtime", tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


def test_waits_are_counted_inside_the_window_only():
    events = [
        event(WINDOW, 100, 100, "user_annotation"),
        event("lightning_swiftmoe/engine.py(7): step", 110, 30, "python_function"),
        event("aten::item", 115, 20, "cpu_op"),
        event("cudaStreamSynchronize", 120, 1),
        event("cudaStreamSynchronize", 50, 1),
        event("cudaEventSynchronize", 150, 3),
        event("cudaEventSynchronize", 160, 30),
        event("cudaMemcpyAsync", 170, 30),
        {"ph": "M", "name": "process_name"},
    ]
    assert waits_in(events) == [
        Wait("cudaStreamSynchronize", 1, "lightning_swiftmoe/engine.py(7): step > aten::item"),
        Wait("cudaEventSynchronize", 30, WINDOW),
    ]
