"""The trace of a run that is killed, resumed, cannot write, or goes on: nothing is lost but the last seconds."""

import dataclasses
import os
import resource
import signal
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch.distributed as dist

from lightning_swiftmoe import trace as trace_module
from lightning_swiftmoe.report.runs import load_runs
from lightning_swiftmoe.simulate import load_trace
from lightning_swiftmoe.step import Step
from lightning_swiftmoe.trace import TraceWriter
from lightning_swiftmoe.trace_file import read_trace
from tests.jobs import Job, Net, SaveAt, data, our_trainer, train
from tests.ranks import run_ranks
from tests.strategy.test_metrics import some_layer

pytestmark = pytest.mark.distributed

JOB = Job(steps=7, slots=3, policy="proportional")


def traced(path, **changes):
    return dataclasses.replace(JOB, rebalancer={"trace": path}, **changes)


class KillRank0(pl.Callback):
    """After six steps."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 6 and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)


def until_killed(path, checkpoint, num_ranks=2):
    job = traced(path, callbacks=lambda: [SaveAt(checkpoint, 3), KillRank0()])
    with pytest.raises(RuntimeError):
        run_ranks(num_ranks, train, job)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "trace.npy.gz"
    run_ranks(2, train, traced(path))
    return read_trace(path)


# With 64 steps in memory the checkpoint, saved before the callback hears of step 3, is all that writes.
@pytest.mark.parametrize(("in_memory", "left"), [(2, 5), (64, 3)])
def test_killed_and_resumed_is_as_never_interrupted(tmp_path, monkeypatch, whole, in_memory, left):
    monkeypatch.setattr(trace_module, "MOST_STEPS", in_memory)
    path, checkpoint = tmp_path / "trace.npy.gz", str(tmp_path / "3.ckpt")
    until_killed(path, checkpoint)
    after_kill = read_trace(path)
    np.testing.assert_array_equal(after_kill["counts"], whole["counts"][:left])
    assert load_trace(path).num_steps == left
    (run,) = load_runs([tmp_path])
    assert run.steps.tolist() == [*range(1, left + 1)]

    run_ranks(2, train, traced(path), checkpoint)
    resumed = read_trace(path)
    assert resumed.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values)


def test_other_ranks_leave_the_old_file_beside_the_new_one(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(trace_module, "MOST_STEPS", 2)
    path, checkpoint = tmp_path / "trace.npy.gz", str(tmp_path / "3.ckpt")
    until_killed(path, checkpoint)
    run_ranks(3, train, traced(path), checkpoint)
    before, after = read_trace(tmp_path / "trace.until-3.npy.gz"), read_trace(path)
    np.testing.assert_array_equal(before["counts"], whole["counts"][:3])
    assert after["steps"].tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(after["counts"].sum(axis=2), whole["counts"][3:].sum(axis=2))
    assert load_runs([tmp_path])[0].steps.tolist() == [4, 5, 6, 7]


def test_without_a_checkpoint_the_file_is_replaced(tmp_path, whole):
    path = tmp_path / "trace.npy.gz"
    for _ in range(2):
        run_ranks(1, train, traced(path, steps=2, slots=5))
        assert read_trace(path)["steps"].tolist() == [1, 2]


def refused(job, only_rank=None):
    if only_rank not in (None, dist.get_rank()):
        job = dataclasses.replace(job, rebalancer={})
    module, trainer = job.module(job), our_trainer(job)
    with pytest.raises(ValueError, match="trace") as error:
        trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return str(error.value), len(module.losses)


@pytest.mark.parametrize("only_rank", [None, 0])
def test_where_nothing_can_be_written_no_rank_starts(tmp_path, only_rank):
    (tmp_path / "file").write_text("no folder")
    results = run_ranks(2, refused, traced(tmp_path / "file" / "trace.npy.gz"), only_rank)
    assert results[0] == results[1]
    message, num_losses = results[0]
    assert num_losses == 0
    assert f"trace={tmp_path}/file/trace.npy.gz cannot be written" in message
    assert "\n" not in message


class Unequal(Net):
    def __init__(self, job):
        super().__init__(job)
        self.moes[1] = type(self.moes[1])(job.width, ffn_size=5, num_experts=3)


def test_layers_that_fit_no_trace_are_refused_on_every_rank(tmp_path):
    results = run_ranks(2, refused, traced(tmp_path / "trace.npy.gz", module=Unequal))
    assert results[0] == results[1]
    assert "the same number of experts, got {'moes.0': 5, 'moes.1': 3}" in results[0][0]


class DiskFull(pl.Callback):
    """No file may grow from step 3 to 5; Python ignores the signal, and a write fails half-way."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if batch_idx == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 10, hard))
        if batch_idx == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def with_a_full_disk(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(traced(path, callbacks=lambda: [DiskFull(path)]))
    return [str(warning.message) for warning in caught if "trace=" in str(warning.message)]


def test_a_failed_write_warns_once_and_training_goes_on(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(trace_module, "MOST_STEPS", 1)
    path = tmp_path / "trace.npy.gz"
    told, silent = run_ranks(2, with_a_full_disk, path)
    assert silent == []
    (message,) = told
    assert f"steps 3 to 3 are missing in trace={path}" in message
    trace = read_trace(path)
    kept = [0, 1, 5, 6]
    assert trace["steps"].tolist() == [step + 1 for step in kept]
    np.testing.assert_array_equal(trace["counts"], whole["counts"][kept])


def test_seconds_and_steps_bound_what_is_in_memory(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(trace_module, "monotonic", lambda: now)
    writer = TraceWriter(tmp_path / "trace.npy.gz")
    layers = (some_layer(np.random.default_rng(0), 2, 3, 9),)
    written = []
    for number in range(1, 140):
        writer.add(number, Step(number, layers, {}))
        now += 6 if number == 130 else 0.01
        written.append(len(read_trace(writer.path)["steps"]) if writer.path.exists() else 0)
    expected = {1: 0, 63: 0, 64: 64, 127: 64, 128: 128, 130: 128, 131: 131, 139: 131}
    assert {number: written[number - 1] for number in expected} == expected


def test_the_name_says_the_format(tmp_path):
    with pytest.raises(ValueError, match=r"named \*\.npy\.gz, got '.*trace\.npz'"):
        TraceWriter(tmp_path / "trace.npz")
