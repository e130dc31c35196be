"""What a trace of the profiler says: kernels by kind, exposed communication, an idle GPU, a waiting host.

Pure functions over the events of a Chrome trace; times in it are microseconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_swiftmoe.cli._kernel_kinds import category

Interval = tuple[float, float]

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
LABELS = ("cpu_op", "user_annotation")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy", "cuMemcpyDtoHAsync_v2", "cuMemcpyHtoDAsync_v2")
LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel"),
    *("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel"),
)
LONG_COPY_US = 20.0  # a copy that only puts itself into a queue takes less of the host's time
WITHIN_DEVICE = "Memcpy DtoD"
STEP = "ProfilerStep#"
STATE_KERNELS = ("push_shards", "pull_shards")


@dataclass(frozen=True)
class Span:
    """One event: a name, from when to when, and the thread it is on."""

    name: str
    start: float
    end: float
    thread: tuple[Any, Any] = (0, 0)

    @property
    def interval(self) -> Interval:
        """From when to when."""
        return self.start, self.end


@dataclass(frozen=True)
class Timeline:
    """A trace, sorted into what this module asks for.

    Args:
        device: kernels and copies on the GPU.
        calls: of CUDA's API on the host within the steps, without copies within a device.
        labels: operators, annotations and Python functions, in which calls happen.
    """

    device: list[Span]
    calls: list[Span]
    labels: list[Span]

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Timeline:
        """From ``traceEvents`` of a Chrome trace."""
        found: dict[str, list[Span]] = defaultdict(list)
        events = [event for event in events if event.get("ph") == "X"]
        local = {correlation(event) for event in events if str(event["name"]).startswith(WITHIN_DEVICE)}
        for event in events:
            kind = str(event.get("cat", "")).lower()
            # The host has no part in such a copy but its launch.
            if kind in CALLS and event["name"] in COPIES and correlation(event) in local:
                continue
            start = float(event["ts"])
            thread = (event.get("pid"), event.get("tid"))
            span = Span(str(event["name"]), start, start + float(event.get("dur", 0.0)), thread)
            found[kind].append(span)
        python = [span for span in found["python_function"] if is_user_code(span.name)]
        labels = [span for kind in LABELS for span in found[kind]]
        return cls(
            [span for kind in ON_DEVICE for span in found[kind]],
            within_steps([span for kind in CALLS for span in found[kind]], labels),
            [label for label in labels if not label.name.startswith(STEP)] + python,
        )

    def summary(self, steps: int) -> dict[str, Any]:
        """All of it, a step: milliseconds and counts.

        ``exposed_ms`` is the time in which communication ran and nothing else did, ``state_exposed_ms`` the same of
        expert state alone. ``idle_ms`` is the time between the first and the last event of the GPU without any.
        """
        communication = [span.interval for span in self.device if kind_of(span.name) == "communication"]
        state = self.state_exchanges()
        rest = [span.interval for span in self.device if kind_of(span.name) != "communication"]
        busy = merged([*communication, *rest])
        waits = self.host_waits()
        return {
            "span_ms": (busy[-1][1] - busy[0][0]) / 1e3 / steps if busy else 0.0,
            "kernel_ms": {kind: us / 1e3 / steps for kind, us in self.kernel_us().items()},
            "communication_ms": total(merged(communication)) / 1e3 / steps,
            "exposed_ms": total(without(merged(communication), merged(rest))) / 1e3 / steps,
            "state_ms": total(merged(state)) / 1e3 / steps,
            "state_exposed_ms": total(without(merged(state), merged(rest))) / 1e3 / steps,
            "idle_ms": total(without([(busy[0][0], busy[-1][1])], busy)) / 1e3 / steps if busy else 0.0,
            "launches": sum(call.name in LAUNCHES for call in self.calls) / steps,
            "copies": sum(call.name in COPIES for call in self.calls) / steps,
            "host_waits": [
                {"call": call, "cause": cause, "count": len(us) / steps, "ms": sum(us) / 1e3 / steps}
                for (call, cause), us in sorted(waits.items(), key=lambda item: -sum(item[1]))
            ],
        }

    def state_exchanges(self) -> list[Interval]:
        """Communication on streams of the ``symmetric`` transport's gradients and weights, barriers included."""
        streams = {span.thread for span in self.device if span.name.startswith(STATE_KERNELS)}
        mine = [span for span in self.device if span.thread in streams]
        return [span.interval for span in mine if kind_of(span.name) == "communication"]

    def kernel_us(self) -> dict[str, float]:
        """Device time by kind, largest first; kernels that run at once count each."""
        found: dict[str, float] = defaultdict(float)
        for span in self.device:
            found[kind_of(span.name)] += span.end - span.start
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def host_waits(self) -> dict[tuple[str, str], list[float]]:
        """Microseconds of each wait of the host for the device, by call and by what asked for it."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        waits = [call for call in self.calls if is_wait(call)]
        for call, cause in zip(waits, causes(waits, self.labels), strict=True):
            found[call.name, cause].append(call.end - call.start)
        return dict(found)


def within_steps(calls: Sequence[Span], labels: Sequence[Span]) -> list[Span]:
    """Without those before the first step and behind the last, where the profiler itself waits; all without steps."""
    steps = [label for label in labels if label.name.startswith(STEP)]
    if not steps:
        return list(calls)
    first = min(step.start for step in steps)
    last = max(step.end for step in steps)
    return [call for call in calls if first <= call.start < last]


def correlation(event: Mapping[str, Any]) -> Any:
    """What a call and the work it started have in common; a number of its own for an event without."""
    return event.get("args", {}).get("correlation", id(event))


def kind_of(kernel: str) -> str:
    """``category``, with the copies of CUDA's own apart."""
    return "copies" if kernel.startswith(("Memcpy", "Memset")) else category(kernel)


def is_wait(call: Span) -> bool:
    """Whether the host stood still: all synchronisation, and copies that took long."""
    if "Synchronize" in call.name:
        return True
    return call.name in COPIES and call.end - call.start > LONG_COPY_US


def is_user_code(function: str) -> bool:
    """Whether a Python frame names a cause: not torch's, Lightning's or Python's own."""
    return not any(word in function for word in ("<built-in", "torch/", "lightning/pytorch", "lib/python", "nn.Module"))


def causes(waits: Sequence[Span], labels: Sequence[Span]) -> list[str]:
    """For each wait the labels around it, from outside in: outermost, ..., the nearest two.

    Labels of one thread lie inside each other or beside each other, as function calls do.
    """
    by_thread: dict[Any, list[Span]] = defaultdict(list)
    for label in labels:
        by_thread[label.thread].append(label)
    numbered: dict[Any, list[tuple[int, Span]]] = defaultdict(list)
    for number, wait in enumerate(waits):
        numbered[wait.thread].append((number, wait))
    found = [""] * len(waits)
    for thread, mine in numbered.items():
        # Outer labels first where two start together.
        around = sorted(by_thread[thread], key=lambda span: (span.start, -span.end))
        stack: list[Span] = []
        position = 0
        for number, wait in sorted(mine, key=lambda item: item[1].start):
            while position < len(around) and around[position].start <= wait.start:
                stack = [span for span in stack if span.end > around[position].start]
                stack.append(around[position])
                position += 1
            stack = [span for span in stack if span.end >= wait.end]
            found[number] = path_of([span.name for span in stack])
    return found


def path_of(names: Sequence[str]) -> str:
    """``outermost > ... > nearest``, short; ``(no label)`` outside of all."""
    if not names:
        return "(no label)"
    kept = [*names[:1], "..", *names[-2:]] if len(names) > 3 else list(names)
    return " > ".join(name if len(name) <= 60 else name[-60:] for name in kept)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time, as intervals in order that do not touch."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What is in ``intervals`` and not in ``others``; both merged."""
    found: list[Interval] = []
    first = 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        number = first
        while number < len(others) and others[number][0] < end:
            if others[number][0] > start:
                found.append((start, others[number][0]))
            start = max(start, others[number][1])
            number += 1
        if start < end:
            found.append((start, end))
    return found


def total(intervals: Iterable[Interval]) -> float:
    """Added up."""
    return sum(end - start for start, end in intervals)
