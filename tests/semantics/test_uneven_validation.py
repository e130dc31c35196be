"""Ranks with different numbers of validation batches: all end at the first that some rank lacks, in one sentence."""

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from tests.jobs import Job, Net, data, our_trainer, sgd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Stream(IterableDataset):
    """Of a length that nobody knows."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Watches(Net):
    def __init__(self, job):
        super().__init__(job)
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((dataloader_idx, batch_idx))
        self.log("val", self.loss(batch), sync_dist=True)


def loaders(kind, counts):
    """One loader for each number of batches; None gives no loaders."""
    if counts is None:
        return None
    items = list(data(Job(steps=5)))
    of = {"sized": list, "stream": Stream}[kind]
    return [DataLoader(of(items[:count]), batch_size=None) for count in counts]


def validate(kind, counts, sanity):
    """``counts`` of each rank; what it said, the validation batches it saw and the steps it took."""
    job = Job(steps=2, slots=4, optimizer=sgd, module=Watches)
    trainer = our_trainer(job, num_sanity_val_steps=sanity)
    module = job.module(job)
    train = data(job, dist.get_rank(), dist.get_world_size())
    said = None
    try:
        trainer.fit(module, train, loaders(kind, counts[dist.get_rank()]))
    except ValueError as error:
        said = str(error)
    return said, module.seen, trainer.global_step


@pytest.mark.parametrize(
    ("kind", "counts", "sanity", "expected", "steps"),
    [
        ("sized", ([3], [2]), 0, "loader 0 has 2 batch(es) on rank(s) [1] and 3 on rank 0", 2),
        ("stream", ([1], [3]), 2, "loader 0 has 1 batch(es) on rank(s) [0] and more than 1 on rank 1", 0),
        ("sized", ([2], [0]), 0, "loader 0 has 0 batch(es) on rank(s) [1] and 2 on rank 0", 2),
        ("sized", ([1, 2], [1, 1]), 0, "loader 1 has 1 batch(es) on rank(s) [1] and 2 on rank 0", 2),
        ("sized", ([1, 2], [2, 1]), 0, "loader 0 has 1 batch(es) on rank(s) [0] and 2 on rank 1", 2),
    ],
)
def test_told_before_the_batch(kind, counts, sanity, expected, steps):
    (said, seen, taken), other = run_ranks(2, validate, kind, counts, sanity, timeout_s=30)
    assert other == (said, seen, taken)  # on no rank more than on the other
    assert expected in said
    fewest = [min(pair) for pair in zip(*counts, strict=True)]
    assert "DistributedSampler, which pads, or drop_last=True" in said
    assert f"limit_val_batches={fewest[0]})" in said or fewest[0] == 0 or counts[0][0] == counts[1][0]
    assert taken == steps


def test_loaders_on_one_rank_only():
    results = run_ranks(2, validate, "sized", ([2], None), 0, timeout_s=30)
    expected = (
        "rank(s) [1] have no validation data or limit_val_batches=0, the others validate: give all ranks the same"
    )
    assert results == [(expected, [], 0)] * 2


@pytest.mark.parametrize("kind", ["sized", "stream"])
def test_even_numbers_pass(kind):
    results = run_ranks(2, validate, kind, ([2, 1], [2, 1]), 0, timeout_s=30)
    assert results == [(None, [(0, 0), (0, 1), (1, 0)], 2)] * 2
