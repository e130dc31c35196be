"""Ranks with different numbers of validation batches: each sees its own, served by those that have none."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_swiftmoe.parallel.uneven_validation import Kind, Turn, check_turns
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, sgd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Stream(IterableDataset):
    """Of a length that nobody knows."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Watches(Net):
    """Notes the loss of every validation batch, and a metric whose states come together."""

    def __init__(self, job):
        super().__init__(job)
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        self.seen.append((dataloader_idx, batch_idx, loss.item()))
        self.mean.update(loss.float())

    def on_validation_epoch_end(self):
        self.log("mean", self.mean)


JOB = Job(steps=2, slots=5, optimizer=sgd, module=Watches)


def loaders(kind, counts, rank, job=JOB):
    """One loader for each number of batches, none of which another rank has; None gives no loaders."""
    if counts is None:
        return None
    items = list(data(dataclasses.replace(job, steps=16)))
    of = {"sized": list, "stream": Stream}[kind]
    made = []
    for loader, count in enumerate(counts):
        first = 4 * rank + loader
        made.append(DataLoader(of(items[first : first + count]), batch_size=None))
    return made


def validate(kind, counts, job=JOB, sanity=0):
    """On one rank of several: what it said, its losses and metric, the steps it took and the weights."""
    trainer, module = our_trainer(job, num_sanity_val_steps=sanity), job.module(job)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    said = None
    try:
        trainer.fit(module, data(job, rank, num_ranks), loaders(kind, counts[rank], rank, job))
    except ValueError as error:
        said = str(error)
    metric = trainer.callback_metrics.get("mean")
    return said, module.seen, metric, trainer.global_step, module.state_dict() if said is None else {}


def validate_alone(counts, job=JOB):
    """In one process: the losses of the batches of each rank, their mean, and the weights."""
    trainer, module = make_trainer(job, num_sanity_val_steps=0), job.module(job).double()
    everything = [loader for rank, count in enumerate(counts) for loader in loaders("sized", count, rank)]
    trainer.fit(module, data(job), everything)
    rest = iter(module.seen)
    seen = [[(i, at, next(rest)[2]) for i, n in enumerate(count) for at in range(n)] for count in counts]
    return seen, torch.tensor([loss for *_, loss in module.seen]).mean(), module.state_dict()


VARIANTS = {
    "plain": {},
    "alone in its group": {"strategy": {"expert_parallel_size": 1}},
    "two groups": {"strategy": {"expert_parallel_size": 2}},
}


@pytest.mark.parametrize(
    ("kind", "counts", "variant"),
    [
        ("sized", ([3], [1]), "plain"),
        ("stream", ([1], [3]), "plain"),
        ("sized", ([1, 3], [2, 1]), "plain"),
        ("stream", ([1, 1], [3, 2], [2, 3]), "plain"),
        ("sized", ([3], [1]), "alone in its group"),
        ("sized", ([2], [1], [3], [1]), "two groups"),
    ],
)
def test_every_rank_sees_its_batches(kind, counts, variant):
    job = dataclasses.replace(JOB, **VARIANTS[variant])
    expected, mean, weights = validate_alone(counts, job)
    results = run_ranks(len(counts), validate, kind, counts, job, timeout_s=30)
    for (said, seen, metric, steps, trained), wanted in zip(results, expected, strict=True):
        assert said is None
        assert [turn[:2] for turn in seen] == [turn[:2] for turn in wanted]
        assert [turn[2] for turn in seen] == pytest.approx([turn[2] for turn in wanted], rel=1e-12)
        assert metric.item() == pytest.approx(mean.item(), rel=1e-6)
        assert steps == 2
        assert largest_error(trained, weights) < 1e-12


def test_in_the_dtype_of_the_others():
    """Tokens are fp32 and travel as bf16."""
    counts = ([1], [3])
    expected, *_ = validate_alone(counts)
    results = run_ranks(2, validate, "sized", counts, dataclasses.replace(JOB, precision="bf16-mixed"), timeout_s=30)
    for (said, seen, *_), wanted in zip(results, expected, strict=True):
        assert said is None
        assert [turn[2] for turn in seen] == pytest.approx([turn[2] for turn in wanted], rel=3e-2)


def test_training_goes_on_behind_it():
    """Validated after every step, once more before the first; the ranks that serve train on as if they had not."""
    job = dataclasses.replace(JOB, steps=4, trainer={"val_check_interval": 1})
    _, _, weights = validate_alone(([2], [1]), job)
    for said, seen, _, steps, trained in run_ranks(2, validate, "sized", ([2], [1]), job, 2):
        assert (said, steps) == (None, 4)
        assert len(seen) in (5 * 2, 5 * 1)
        assert largest_error(trained, weights) < 1e-12


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (([2], [0]), "loader 0 has 0 batch(es) on rank(s) [1] and 2 on rank 0"),
        (([1, 2], [1, 0]), "loader 1 has 0 batch(es) on rank(s) [1] and 2 on rank 0"),
        (([0, 1], [1, 1]), "loader 0 has 0 batch(es) on rank(s) [0] and 1 on rank 1"),
        (([1, 1, 1], [1, 0, 1]), "loader 1 has 0 batch(es) on rank(s) [1] and 1 on rank 0"),
    ],
)
def test_every_rank_needs_one(counts, expected):
    for said, _, _, steps, _ in run_ranks(2, validate, "sized", counts, timeout_s=30):
        assert expected in said
        assert "every rank needs at least one of every loader" in said
        assert steps == 2


def test_loaders_on_one_rank_only():
    expected = (
        "rank(s) [1] have no validation data or limit_val_batches=0, the others validate: give all ranks the same"
    )
    for said, seen, _, steps, _ in run_ranks(2, validate, "sized", ([2], None), timeout_s=30):
        assert (said, seen, steps) == (expected, [], 0)


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_even_numbers_pass(kind):
    for said, seen, *_ in run_ranks(2, validate, kind, ([2, 1], [2, 1]), timeout_s=30):
        assert said is None
        assert [turn[:2] for turn in seen] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn(Kind.LAYER, 0, 2, 2), Turn(Kind.LAYER, 1, 2, 2), Turn(Kind.LOADER_ENDS, 0, 1)], "different MoE layers"),
        ([Turn(Kind.LAYER, 0, 2, 2), Turn(Kind.LAYER, 0, 2, 1), Turn(Kind.LOADER_ENDS, 0, 1)], "or dtypes"),
        ([Turn(Kind.LAYER, 0, 2, 2), Turn(Kind.BATCH, 0, 1, 3), Turn(Kind.LOADER_ENDS, 0, 1)], "different MoE layers"),
        ([Turn(Kind.LOADER_ENDS, 0, 1), Turn(Kind.LOADER_ENDS, 1, 1)], "ended a validation loader"),
        ([Turn(Kind.LOADER_ENDS, 0, 1), Turn(Kind.VALIDATION_ENDS)], "ended a validation loader"),
    ],
)
def test_what_ranks_cannot_do_together(turns, message):
    with pytest.raises(ValueError, match=message):
        check_turns(turns)
