"""Where the host waits for the device: counted in a profiler's trace of whole steps."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from tests.gpu.cases import GpuJob, fit, on_gpus
from tests.jobs import Net

WINDOW = "steady steps"
ALWAYS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize"}
# An event that has passed costs nothing.
WHEN_LONGER = {"cudaEventSynchronize": 20.0, "cuEventSynchronize": 20.0}


@dataclass(frozen=True)
class Wait:
    """One call in which the host stood still.

    Args:
        call: of CUDA's runtime.
        microseconds: it took.
        where: innermost frames or operators around it, outermost first.
    """

    call: str
    microseconds: float
    where: str


class Quiet(Net):
    """A training step that does not wait by itself."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class ErrorsOnWaits(Quiet):
    """Torch raises where its own code waits between the start of a step's forward and the end of its backward."""

    def training_step(self, batch, batch_idx):
        self._debug("error" if batch_idx >= 3 else "default")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self._debug("default")

    def on_exception(self, exception):
        self._debug("default")

    def _debug(self, mode):
        if on_gpus():
            torch.cuda.set_sync_debug_mode(mode)


class Profile(pl.Callback):
    """A trace of ``steps`` whole steps from step ``start`` on.

    Args:
        start: first step in the trace; the ones before warm up.
        steps: how many.
    """

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.stop = start, start + steps
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpus():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, with_stack=True)
        self._window = torch.profiler.record_function(WINDOW)
        self.events: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.start:
            self._profiler.start()
            self._window.__enter__()
        if batch_idx == self.stop:
            self._window.__exit__(None, None, None)
            self._profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "trace.json")
                self._profiler.export_chrome_trace(str(path))
                self.events = json.loads(path.read_text())["traceEvents"]


def profiled(job: GpuJob) -> tuple[list[Wait], int]:
    """Train under a profiler; the waits of three steady steps, and how many events their trace has."""
    # DDP times its first ten iterations, and waits for their events.
    profile = Profile(start=13, steps=3)
    fit(job, callbacks=[profile])
    return waits_in(profile.events), len(profile.events)


def waits_in(events: list[dict[str, Any]]) -> list[Wait]:
    """Every wait in the window of the trace."""
    timed = [event for event in events if event.get("ph") == "X"]
    window = next(event for event in timed if event["name"] == WINDOW and event["cat"] != "gpu_user_annotation")
    inside = [event for event in timed if window["ts"] <= event["ts"] < window["ts"] + window["dur"]]
    found = []
    for event in inside:
        name = event["name"]
        if event.get("cat") not in ("cuda_runtime", "cuda_driver"):
            continue
        if name in ALWAYS or event["dur"] > WHEN_LONGER.get(name, float("inf")):
            found.append(Wait(name, event["dur"], _where(event, timed)))
    return found


def _where(event: dict[str, Any], timed: list[dict[str, Any]]) -> str:
    around = [
        other
        for other in timed
        if other.get("cat") in ("python_function", "cpu_op", "user_annotation")
        and other.get("tid") == event.get("tid")
        and other["ts"] <= event["ts"] <= other["ts"] + other["dur"]
    ]
    names = [str(other["name"]) for other in sorted(around, key=lambda other: other["dur"])]
    ours = [name for name in names if "swiftmoe" in name][:3]
    return " > ".join(reversed([*names[:2], *(name for name in ours if name not in names[:2])]))


def summary(waits: list[Wait]) -> str:
    """One line for each place."""
    places = Counter((wait.call, wait.where) for wait in waits)
    return "\n".join(f"{count} x {call} in {where}" for (call, where), count in places.most_common())
