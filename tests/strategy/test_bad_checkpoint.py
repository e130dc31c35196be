"""A bad checkpoint is refused on all ranks alike, and the module is what it was."""

import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe.checkpoint.reading import CheckpointError
from tests.checkpoint.damage import damaged, of_others
from tests.jobs import Job, Net, data, our_trainer, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

JOB = Job(num_experts=5, slots=5, steps=2)
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


def refusal(paths, fn="fit"):
    """What this rank says of its own one of ``paths``."""
    module = LONGER.module(LONGER)
    batches = data(LONGER, dist.get_rank(), dist.get_world_size())
    try:
        getattr(our_trainer(LONGER), fn)(module, batches, ckpt_path=str(paths[dist.get_rank()]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_rank_that_cannot_read_holds_up_nobody(good, bad, tmp_path, which):
    for path, error in ((bad[0], "CheckpointError"), (tmp_path / "nothing.ckpt", "FileNotFoundError")):
        said = run_ranks(3, refusal, [path if rank == which else good for rank in range(3)])
        assert said[which].startswith(error)
        reason = said[which].partition(": ")[2]
        others = {text for rank, text in enumerate(said) if rank != which}
        assert others == {f"CheckpointError: rank {which} does not load the checkpoint, so nobody does: {reason}"}


def test_ranks_that_find_different_checkpoints(good, tmp_path):
    run_ranks(1, train, LONGER, None, str(tmp_path / "other.ckpt"))
    said = run_ranks(2, refusal, [good, tmp_path / "other.ckpt"])
    assert all("found another checkpoint under this name" in text for text in said)


@pytest.mark.parametrize("fn", ["validate", "test", "predict"])
def test_outside_of_fit(good, bad, fn):
    named = {path.stem.rpartition("-")[0]: path for path in bad}
    some = [named[kind] for kind in ("cut_short", "flip_in_tensor", "lack_weights", "reshape_weight", "with_code-in")]
    for first, *others in run_ranks(2, refusals_of, [good, *some], fn):
        assert first is None
        assert all(text.startswith("CheckpointError: ") for text in others), others


def refusals_of(paths, fn):
    return [refusal([path] * dist.get_world_size(), fn) for path in paths]


def fail_before_training(good):
    """Whatever fails after weights were loaded: here a callback, on one rank of two."""

    class Fails(pl.Callback):
        def on_fit_start(self, trainer, module):
            if trainer.global_rank == 1:
                raise KeyError("mine")
            raise KeyError("others")

    job = dataclasses.replace(LONGER, callbacks=lambda: [Fails()])
    module = job.module(job)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(KeyError):
        fit(module, job, good)
    after = module.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


def test_whatever_fails_before_training(good):
    assert run_ranks(2, fail_before_training, good) == [True, True]


def test_strict_loading_off(good, tmp_path):
    """Unknown and missing weights are no mistake then; other shapes still are."""
    content = of_others(good)
    content["state_dict"]["other"] = content["state_dict"].pop("inp.bias")
    torch.save(content, tmp_path / "names.ckpt")
    content["state_dict"]["inp.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "shapes.ckpt")
    assert run_ranks(1, loosely, tmp_path / "names.ckpt")[0] is None
    assert (
        "'inp.weight' is [3] in the checkpoint, [6, 6] in the module"
        in run_ranks(1, loosely, tmp_path / "shapes.ckpt")[0]
    )


def loosely(path):
    module = LONGER.module(LONGER)
    module.strict_loading = False
    try:
        fit(module, LONGER, path)
    except CheckpointError as error:
        return str(error)
    return None


class Renames(Net):
    """Loads names of an older version."""

    def __init__(self, job):
        super().__init__(job)
        self.inp.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module, state_dict, prefix, *_):
        state_dict[f"{prefix}bias"] = state_dict.pop(f"{prefix}shift")


def test_hooks_that_know_better(good, tmp_path):
    content = of_others(good)
    content["state_dict"]["inp.shift"] = content["state_dict"].pop("inp.bias")
    torch.save(content, tmp_path / "old.ckpt")
    job = dataclasses.replace(LONGER, module=Renames)
    renamed = run_ranks(2, train, job, str(tmp_path / "old.ckpt"))[0]
    expected = run_ranks(2, train, LONGER, str(good))[0]
    assert all(torch.equal(value, renamed[name]) for name, value in expected.items())
