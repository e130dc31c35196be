"""Measures the steps of one rank. Inside the timed block the host never waits for the device."""

from __future__ import annotations

import gc
import gzip
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_swiftmoe.cli._measured import write_whole
from lightning_swiftmoe.cli._peers.job import PROFILER_WARMUP, Job
from lightning_swiftmoe.cli._peers.timeline import Timeline

GIB, KIB = 2**30, 2**10


@dataclass
class Result:
    """What one rank measured.

    Args:
        steps_ms: of each timed step, by the device's own clock.
        block_s: of the timed block, by the host's clock, waiting for the device before and behind it.
        losses: mean over the ranks, in nats per token, of every step from the first one on.
        survival: assignments processed per assignment routed; None: not known.
        imbalances: max/mean load of the ranks, mean over layers, of each timed step; empty: not known.
        allocated_gib, reserved_gib: highest in the timed block; 0 on a CPU.
        device_gib: of this rank's device that is taken behind the timed block, by whomever; 0 on a CPU.
        start_s: from the system's turn, with everything imported, to its first step.
        start_host_gib: the most host memory until then.
        profile: of ``timeline.Timeline.summary``, where profiled.
    """

    steps_ms: list[float] = field(default_factory=list)
    block_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    survival: float | None = None
    imbalances: list[float] = field(default_factory=list)
    allocated_gib: float = 0.0
    reserved_gib: float = 0.0
    device_gib: float = 0.0
    start_s: float = 0.0
    start_host_gib: float = 0.0
    profile: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        write_whole(path, asdict(self))


class Meter:
    """Told of every step by whoever trains.

    Args:
        job: this rank.
        done: called behind the last step, with the result; may leave the process.
        wait_for_quiet: called in front of the timed block; returns when nobody else keeps the machine busy.

    Attributes:
        survival: asked behind the last step; set by who knows.
        imbalances: of every step from the first on; filled by who knows.
        before_block: called once, in front of the timed block.
    """

    def __init__(self, job: Job, done: Callable[[Result], None], wait_for_quiet: Callable[[], None]) -> None:
        self.job, self.plan, self.done = job, job.plan, done
        self.wait_for_quiet = wait_for_quiet
        self.survival: Callable[[], float | None] = lambda: None
        self.imbalances: list[float] = []
        self.before_block: Callable[[], None] = lambda: None
        self.result = Result()
        self._losses: list[Tensor] = []
        self._marks: list[Any] = []
        self._turn_s = time.perf_counter()
        self._start_s = 0.0
        self._profiler: Any = None

    def before_step(self, index: int) -> None:
        """In front of step ``index``, from 0."""
        if index == 0:
            self.result.start_s = time.perf_counter() - self._turn_s
            self.result.start_host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB
            self._free_what_building_left()
        if index == self.plan.warmup:
            self.before_block()
            self._start_block()
        if self.plan.profiled and index == self.plan.warmup + self.plan.steps:
            self._profiler = make_profiler(self.job)
            self._profiler.start()

    def after_step(self, index: int, loss: Tensor) -> None:
        """Behind step ``index``, as soon as the host has asked for all of it."""
        last_timed = self.plan.warmup + self.plan.steps - 1
        if index <= last_timed:
            self._losses.append(loss.detach())
        if self.plan.warmup <= index <= last_timed:
            self._marks.append(self._mark())
        if index == last_timed:
            self._end_block()
        last = index == self.plan.total_steps - 1
        if last:
            self.wait_for_device()
        if self._profiler is not None:
            self._profiler.step()
        if last:
            self._finish()

    def wait_for_device(self) -> None:
        """The host waits until the device has done all it was asked for."""
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()

    def _free_what_building_left(self) -> None:
        gc.collect()
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()

    def _start_block(self) -> None:
        self.wait_for_quiet()
        gc.collect()
        self.wait_for_device()
        barrier()
        self.wait_for_device()
        if self.job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._start_s = time.perf_counter()
        self._marks = [self._mark()]

    def _end_block(self) -> None:
        self.wait_for_device()
        self.result.block_s = time.perf_counter() - self._start_s
        if self.job.device.type == "cuda":
            self.result.allocated_gib = torch.cuda.max_memory_allocated() / GIB
            self.result.reserved_gib = torch.cuda.max_memory_reserved() / GIB
            free, total = torch.cuda.mem_get_info()
            self.result.device_gib = (total - free) / GIB

    def _mark(self) -> Any:
        """A point in time on the device."""
        if self.job.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self) -> None:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        self.result.steps_ms = [between_ms(first, second) for first, second in pairs]
        self.result.losses = mean_over_ranks(torch.stack(self._losses).double())
        self.result.survival = self.survival()
        self.result.imbalances = self.imbalances[self.plan.warmup : self.plan.warmup + self.plan.steps]
        if self._profiler is not None:
            self._profiler.stop()
            self.result.profile = write_trace(self._profiler, self.job)
        self.done(self.result)


def between_ms(first: Any, second: Any) -> float:
    """Milliseconds between two marks that are both reached."""
    return (second - first) * 1e3 if isinstance(first, float) else first.elapsed_time(second)


def barrier() -> None:
    """All ranks meet; nothing where there is one."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(values: Tensor) -> list[float]:
    """Element by element. Collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def make_profiler(job: Job) -> Any:
    """Records ``job.plan.profiled`` steps behind one that is thrown away."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if job.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=PROFILER_WARMUP, active=job.plan.profiled, repeat=1)
    return torch.profiler.profile(activities=kinds, schedule=schedule, with_stack=job.plan.stacks)


def write_trace(profiler: Any, job: Job) -> dict[str, Any]:
    """The trace as a file for chrome://tracing or Perfetto, and what it says."""
    path = job.folder / f"trace_rank{job.rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return Timeline.of(events).summary(job.plan.profiled)
