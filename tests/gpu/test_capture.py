"""CUDA graphs of users around layers whose experts sit on two GPUs."""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from tests.gpu.cases import HOPPER, GpuJob, fit, placed
from tests.jobs import Net, data, our_trainer

pytestmark = pytest.mark.gpu


class Captured(Net):
    """Validation replays what the first validation captured, and runs the layers themselves beside it."""

    graph = None
    larger = False

    def validation_step(self, batch, batch_idx):
        x = torch.tanh(self.inp(batch[0])) * (1 + self.global_step)
        want = self._layers(x)
        if self.graph is None:
            self.given = x.clone()
            self.graph = torch.cuda.CUDAGraph()
            # Watchdogs ask for their events in other threads.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self._layers(self.given)
        if self.larger:
            # More room is made, while the graph goes on in what it was captured with.
            self._layers(torch.cat([x] * (2 + len(self.seen) % 3)))
        self.given.copy_(x)
        self.result.zero_()
        self.graph.replay()
        self.seen.append((self.global_step, bool(torch.equal(self.result, want)), float(want.abs().max())))

    def _layers(self, x):
        for moe in self.moes:
            x = x + moe(x)
        return x


class CapturedAmongLarger(Captured):
    """Between the replays come larger batches than the captured one."""

    larger = True


class Comparisons(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        self.seen = pl_module.seen


def validate_replays(job):
    comparisons = Comparisons()
    outcome = fit(job, callbacks=[comparisons])
    placements = [layer.next_placement.table.tolist() for step in outcome.steps for layer in step.layers]
    return comparisons.seen, placements


@pytest.mark.parametrize("transport", ["symmetric"])
@pytest.mark.parametrize("module", [Captured, CapturedAmongLarger])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize(("width", "moe"), [(64, HOPPER), (24, {"ffn_size": 40})], ids=["hopper", "grouped_mm"])
def test_replays_follow_weights_and_placements(several, transport, module, width, moe, capacity_factor):
    moe = {**moe, "capacity_factor": capacity_factor}
    job = GpuJob(width=width, moe=moe, module=module, precision="bf16-mixed", transport=transport, validates=True)
    for seen, placements in several.run(validate_replays, job):
        assert [same for _, same, _ in seen] == [True] * len(seen)
        assert len({size for *_, size in seen}) > 4  # weights changed
        assert len({step for step, *_ in seen}) >= 4
        assert len(set(map(str, placements))) > 5


class CapturedInTraining(Net):
    def training_step(self, batch, batch_idx):
        x = self.inp(batch[0])
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            self.moes[0](x)


class CapturedInValidation(Net):
    def validation_step(self, batch, batch_idx):
        x = self.inp(batch[0])
        self.moes[0](x)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            self.moes[0](x)


def error_of(job):
    trainer, module = our_trainer(job, **placed()), job.module(job)
    batches = data(job, dist.get_rank(), dist.get_world_size())
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(module, batches, batches)
    return str(caught.value)


@pytest.mark.parametrize(
    ("transport", "module", "options", "message"),
    [
        ("symmetric", CapturedInTraining, {}, "the strategy must see every forward"),
        ("nccl", CapturedInValidation, {}, "this transport waits for the host"),
        ("symmetric", CapturedInValidation, {"transient_copies": 1}, "it takes transient_copies=0"),
        ("symmetric", CapturedInValidation, {"split": "even"}, "it takes split='exact'"),
        ("symmetric", CapturedInValidation, None, "products of torch.float32 wait for the host"),
    ],
)
def test_what_replays_would_do_wrong_is_refused(several, transport, module, options, message):
    precision = "32-true" if options is None else "bf16-mixed"
    strategy = {"transport": transport, **(options or {})}
    job = GpuJob(width=64, moe=HOPPER, module=module, precision=precision, strategy=strategy)
    for text in several.run(error_of, job):
        assert "layer 'moes.0' cannot be captured in a CUDA graph: " in text
        assert message in text
