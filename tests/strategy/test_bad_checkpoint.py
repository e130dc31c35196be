"""A bad checkpoint is refused on all ranks alike, and the module is what it was."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.damage import damaged
from tests.jobs import Job, data, our_trainer, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

JOB = Job(num_experts=5, slots=5, precision="32-true", steps=2)
LONGER = dataclasses.replace(JOB, steps=3)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    run_ranks(1, train, JOB, None, str(path))
    return path


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory):
    files = damaged(good, tmp_path_factory.mktemp("bad"))
    assert len(files) == 200
    return files


def refusals(paths, good, job=LONGER):
    """What ``fit`` says of each file, with one module for all of them; afterwards the good one trains it."""
    module, said = job.module(job), []
    own = dict(module.named_parameters())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for path in paths:
        try:
            fit(module, job, path)
            said.append(None)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        assert dict(module.named_parameters()).items() == own.items(), path
        for name, value in module.state_dict().items():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name]), (path, name)
    fit(module, job, good)
    return said, module.state_dict()


def fit(module, job, path):
    batches = data(job, dist.get_rank(), dist.get_world_size())
    our_trainer(job).fit(module, batches, ckpt_path=str(path))


@pytest.mark.parametrize(("num_ranks", "every"), [(1, 1), (2, 5), (3, 10)])
def test_refused_and_untouched(good, bad, num_ranks, every):
    some = bad[::every]
    results = run_ranks(num_ranks, refusals, some, good)
    for path, *said in zip(some, *(said for said, _ in results), strict=True):
        assert all(text is not None and text.startswith("CheckpointError: ") for text in said), (path.name, said)
        assert len(set(said)) == 1, said
        assert said[0].count("\n") == 0
    assert not (bad[0].parent / "ran").exists()
    expected = run_ranks(num_ranks, train, LONGER, str(good))[0]
    assert all(torch.equal(value, results[0][1][name]) for name, value in expected.items())
