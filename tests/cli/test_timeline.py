"""What is read out of a trace, against intervals worked out by hand."""

import pytest

from lightning_swiftmoe.cli._peers.timeline import Timeline, merged, total, without


def event(category, name, start, duration, thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 7, "tid": thread}


NCCL, GEMM = "ncclDevKernel_SendRecv", "nvjet_tst_128x256"

# Microseconds:   0        100       200       300       400       500
# compute            [50 .. 150]         [250 .. 300]
# copies                                                  [400 .. 420]
# communication          [120 ........ 220]    [290 . 330]      [410 .. 500]
DEVICE = [
    event("kernel", GEMM, 50, 100),
    event("kernel", GEMM, 250, 50),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 400, 20),
    event("kernel", NCCL, 120, 100),
    event("kernel", NCCL, 290, 40),
    event("kernel", NCCL, 410, 90),
]


def test_communication_that_nothing_hides():
    found = Timeline.of(DEVICE).summary(steps=2)
    # 150..220, 300..330 and 420..500
    assert found["exposed_ms"] == pytest.approx((70 + 30 + 80) / 1e3 / 2)
    assert found["communication_ms"] == pytest.approx((100 + 40 + 90) / 1e3 / 2)
    # 220..250 and 330..400; the step is 50..500
    assert found["idle_ms"] == pytest.approx((30 + 70) / 1e3 / 2)
    assert found["span_ms"] == pytest.approx(450 / 1e3 / 2)
    assert found["kernel_ms"] == pytest.approx(
        {"communication": 230 / 2e3, "matrix products": 150 / 2e3, "copies": 20 / 2e3}
    )


def test_streams_that_compute_at_once_count_once_where_time_is_asked_for():
    found = Timeline.of([event("kernel", GEMM, 0, 100), event("kernel", GEMM, 50, 100)]).summary(steps=1)
    assert found["kernel_ms"] == {"matrix products": pytest.approx(0.2)}
    assert found["span_ms"] == pytest.approx(0.15)
    assert found["idle_ms"] == 0


def test_copies_within_the_device_are_no_waits():
    """However long the launch took."""
    events = [
        event("cuda_runtime", "cudaMemcpyAsync", 0, 30) | {"args": {"correlation": 1}},
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 40, 5) | {"args": {"correlation": 1}},
        event("cuda_runtime", "cudaMemcpyAsync", 50, 31) | {"args": {"correlation": 2}},
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 60, 5) | {"args": {"correlation": 2}},
    ]
    found = Timeline.of(events).summary(steps=1)
    assert found["copies"] == 1
    assert [wait["ms"] for wait in found["host_waits"]] == [pytest.approx(0.031)]


@pytest.mark.parametrize(
    "kernel", ["push_rows_kernel", "pull_shards_kernel", "barrier_kernel", "exchange_counts_kernel"]
)
def test_our_kernels_through_peers_memory_communicate(kernel):
    assert Timeline.of([event("kernel", kernel, 0, 8)]).summary(steps=1)["communication_ms"] == pytest.approx(0.008)


def test_exchanges_of_expert_state_are_told_from_those_of_tokens_by_their_stream():
    """Barriers are of one name; state is what runs on the stream of its pushes and pulls."""
    computing, state = 7, 20
    events = [
        event("kernel", GEMM, 0, 100, thread=computing),
        event("kernel", "push_rows_kernel", 100, 50, thread=computing),
        event("kernel", "barrier_kernel", 150, 10, thread=computing),
        event("kernel", "barrier_kernel", 80, 10, thread=state),
        event("kernel", "pull_shards_kernel", 90, 40, thread=state),  # 10 beside the product, 30 beside the rows
    ]
    found = Timeline.of(events).summary(steps=1)
    assert found["state_ms"] == pytest.approx(0.05)
    assert found["state_exposed_ms"] == pytest.approx(0.03)
    assert found["communication_ms"] == pytest.approx(0.08)
    # All of it is behind the product.
    assert found["exposed_ms"] == pytest.approx(0.06)


def test_without_exchanges_of_state_there_is_none():
    found = Timeline.of(DEVICE).summary(steps=1)
    assert (found["state_ms"], found["state_exposed_ms"]) == (0, 0)


@pytest.mark.parametrize("kernel", ["count_blocks_kernel", "address_kernel", "scan_ranks_kernel", "plan_hosts_kernel"])
def test_kernels_that_plan_where_tokens_go(kernel):
    assert Timeline.of([event("kernel", kernel, 0, 8)]).summary(steps=1)["kernel_ms"] == {
        "plan of tokens": pytest.approx(0.008)
    }


HOST = [
    event("user_annotation", "ProfilerStep#1", 0, 1000),
    event("user_annotation", "Optimizer.step", 100, 300),
    event("cpu_op", "aten::to", 110, 100),
    event("cpu_op", "aten::_to_copy", 110, 100),
    event("cpu_op", "aten::copy_", 120, 80),
    event("cuda_runtime", "cudaMemcpyAsync", 130, 5),  # into the queue
    event("cuda_runtime", "cudaStreamSynchronize", 136, 60),
    event("cpu_op", "aten::item", 500, 50),
    event("cuda_runtime", "cudaMemcpyAsync", 510, 30),  # pageable: the host stood still
    event("cuda_runtime", "cudaEventSynchronize", 600, 7),
    event("cuda_runtime", "cudaLaunchKernel", 700, 4),
    event("cuda_driver", "cuLaunchKernelEx", 710, 4),
    event("cpu_op", "aten::item", 590, 50, thread=2),  # another thread's, at the time of the event's
]


def test_waits_of_the_host_and_what_asked_for_them():
    assert Timeline.of(HOST).host_waits() == {
        ("cudaStreamSynchronize", "Optimizer.step > .. > aten::_to_copy > aten::copy_"): [60],
        ("cudaMemcpyAsync", "aten::item"): [30],
        ("cudaEventSynchronize", "(no label)"): [7],
    }


def test_waits_at_the_ends_of_a_trace_are_the_profilers():
    """It waits for the device before its first step and behind its last."""
    ends = [
        event("cuda_runtime", "cudaDeviceSynchronize", -20, 10),
        event("cuda_runtime", "cudaDeviceSynchronize", 1001, 10),
    ]
    assert Timeline.of([*ends, *HOST]).host_waits() == Timeline.of(HOST).host_waits()


def test_calls_are_counted_for_each_step():
    found = Timeline.of(HOST).summary(steps=2)
    assert (found["launches"], found["copies"]) == (1, 1)
    assert [(wait["count"], wait["ms"]) for wait in found["host_waits"]] == [(0.5, 0.03), (0.5, 0.015), (0.5, 0.0035)]


def test_a_line_of_python_is_a_cause_and_a_frame_of_torch_is_not():
    stack = [
        event("python_function", "lightning_swiftmoe/layers/dispatchers.py(113): __call__", 0, 100),
        event("python_function", "torch/nn/modules/module.py(1): _call_impl", 0, 90),
        event("cuda_runtime", "cudaStreamSynchronize", 10, 20),
    ]
    ((_, cause),) = Timeline.of(stack).host_waits()
    assert cause == "lightning_swiftmoe/layers/dispatchers.py(113): __call__"


@pytest.mark.parametrize(
    ("intervals", "others", "left"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 8)], [(0, 2), (4, 6), (8, 10)]),
        ([(0, 3), (5, 9)], [(2, 6), (8, 20)], [(0, 2), (6, 8)]),
        ([(5, 6), (7, 8)], [(0, 10)], []),
    ],
)
def test_differences_of_intervals(intervals, others, left):
    assert without(intervals, others) == left


def test_unions_of_intervals():
    assert merged([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]
    assert total(merged([(0, 2), (1, 3)])) == 3
