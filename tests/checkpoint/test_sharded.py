"""Sharded checkpoints: folders that load on any number of ranks, elsewhere, and only as they were written."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_swiftmoe.checkpoint.folder import META, TABLE, check_folder, read_table
from lightning_swiftmoe.checkpoint.reading import CheckpointError
from lightning_swiftmoe.checkpoint.sharded_reading import read_folder
from tests.jobs import Job, Net, SaveAt, data, full, largest_error, make_trainer, our_trainer, train_alone
from tests.ranks import Ranks, run_ranks

pytestmark = pytest.mark.distributed

SHARDED = {"checkpoint": "sharded"}
FULL = Job(num_experts=5, slots=5, policy="proportional", precision="64-true", steps=6)
SAVES = dataclasses.replace(FULL, strategy=SHARDED)


def fit(job, path=None, save_at_3=None):
    """Losses of every step, and weights after the last."""
    if save_at_3 is not None:
        job = dataclasses.replace(job, callbacks=lambda: [SaveAt(save_at_3, 3)])
    module, trainer = Net(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=path)
    return module.losses, module.state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of three ranks, uneven shards; what the whole run gave; and a full checkpoint of the same step."""
    folder = tmp_path_factory.mktemp("saved")
    whole = run_ranks(3, fit, SAVES, None, str(folder / "sharded.ckpt"))
    run_ranks(3, fit, FULL, None, str(folder / "full.ckpt"))
    return folder / "sharded.ckpt", whole, folder / "full.ckpt"


def test_resumed_bit_for_bit(saved):
    path, whole, _ = saved
    resumed = run_ranks(3, fit, SAVES, str(path))
    for (losses, weights), (resumed_losses, resumed_weights) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses[3:]
        assert all(torch.equal(resumed_weights[key], value) for key, value in weights.items())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("strategy", [{}, {"optimizer_state": "bound"}], ids=["decoupled", "bound"])
def test_other_ranks_to_rounding(saved, num_ranks, strategy):
    path, whole, _ = saved
    result = run_ranks(num_ranks, fit, dataclasses.replace(FULL, strategy=strategy), str(path))[0][1]
    assert largest_error(result, whole[0][1]) < 1e-10


def test_a_file_is_resumed_into_folders(saved):
    _, whole, file = saved
    assert largest_error(run_ranks(2, fit, SAVES, str(file))[0][1], whole[0][1]) < 1e-10


VARIANTS = {
    "groups": {"expert_parallel_size": 2},
    "groups of one": {"expert_parallel_size": 1},
    "offload": {"offload_optimizer": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path, variant):
    """Four ranks, saved in ``fit`` and after it: what a file would hold, and bit for bit on the same ranks."""
    sharded = dataclasses.replace(FULL, strategy={**SHARDED, **VARIANTS[variant]})
    plain = dataclasses.replace(FULL, strategy=VARIANTS[variant])
    path, after, file = tmp_path / "3.ckpt", tmp_path / "after.ckpt", tmp_path / "3-full.ckpt"
    whole = run_ranks(4, fit_and_save, sharded, None, str(path), str(after))
    run_ranks(4, fit_and_save, plain, None, str(file), str(tmp_path / "after-full.ckpt"))
    for folder, expected in ((path, file), (after, tmp_path / "after-full.ckpt")):
        ours = consolidated(folder, tmp_path / f"one-{folder.name}")
        theirs = torch.load(expected, weights_only=True)
        assert same(ours["state_dict"], theirs["state_dict"])
        assert same(ours["optimizer_states"], theirs["optimizer_states"])
    resumed = run_ranks(4, fit, sharded, str(path))
    for (losses, weights), (resumed_losses, resumed_weights) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses[3:]
        assert all(torch.equal(resumed_weights[key], value) for key, value in weights.items())


def fit_and_save(job, path, at_3, after):
    job = dataclasses.replace(job, callbacks=lambda: [SaveAt(at_3, 3)])
    module, trainer = Net(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=path)
    trainer.save_checkpoint(after)
    return module.losses, module.state_dict()


def consolidated(path: Path, out: Path):
    from lightning_swiftmoe.cli.main import main

    assert main(["checkpoint", "consolidate", str(path), str(out)]) == 0
    return torch.load(out, weights_only=True)


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_consolidated_is_what_rank_0_would_have_saved(saved, tmp_path):
    path, _, file = saved
    ours, theirs = consolidated(path, tmp_path / "one.ckpt"), torch.load(file, weights_only=True)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert same(ours[key], theirs[key]), key


def test_one_process_without_the_strategy(saved, tmp_path):
    path, whole, _ = saved
    consolidated(path, tmp_path / "one.ckpt")
    assert largest_error(train_alone(FULL, str(tmp_path / "one.ckpt"), None), whole[0][1]) < 1e-10


@pytest.mark.parametrize("tool", ["pytorch", pytest.param("fabric", marks=pytest.mark.exhaustive)])
def test_lightnings_consolidation(saved, tmp_path, tool):
    path, _, file = saved
    out = tmp_path / "theirs.ckpt"
    module = f"lightning.{tool}.utilities.consolidate_checkpoint"
    subprocess.run([sys.executable, "-m", module, str(path), "--output_file", str(out)], check=True)
    theirs, expected = torch.load(out, weights_only=True), torch.load(file, weights_only=True)
    assert same(theirs["state_dict"], expected["state_dict"])
    assert theirs["global_step"] == 3


def test_plain_torch(saved):
    path, _, file = saved
    expected = torch.load(file, weights_only=True)["state_dict"]
    state = {"state_dict": {name: torch.zeros_like(value) for name, value in expected.items()}}
    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    assert same(state["state_dict"], expected)


class FullyShardedNet(Net):
    def configure_model(self):
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


def loaded(kind, job, path):
    """Weights and moments under another strategy, before a step is made."""
    if kind == "fsdp2":
        module = FullyShardedNet(job)
        strategy = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    else:
        module, strategy = Net(job), DDPStrategy()
    trainer = make_trainer(job, strategy, num_nodes=dist.get_world_size(), plugins=[Ranks()])
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=path)
    assert trainer.global_step == 3
    weights = {name: full(value) for name, value in module.state_dict().items()}
    state = trainer.optimizers[0].state
    moments = {
        f"{name}.{key}": full(state[param][key])
        for name, param in module.named_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    return weights, moments


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_other_strategies_load_it(tmp_path, kind):
    """FSDP2, as Lightning's ModelParallelStrategy has it, reads the folder; DDP the consolidated file."""
    job = dataclasses.replace(SAVES, precision="32-true", steps=3)
    path = tmp_path / "3.ckpt"
    run_ranks(3, fit, job, None, str(path))
    file = tmp_path / "one.ckpt"
    content = consolidated(path, file)
    weights, moments = run_ranks(2, loaded, kind, job, str(path if kind == "fsdp2" else file))[0]
    assert same(weights, dict(content["state_dict"]))
    saved = content["optimizer_states"][0]
    assert len(moments) == 3 * len(saved["state"])
    names = read_folder(path)["optimizer_states"][0].names
    for number, state in saved["state"].items():
        assert all(torch.equal(moments[f"{names[number]}.{key}"], value) for key, value in state.items())


def test_every_rank_writes_its_share(tmp_path):
    job = Job(num_experts=4, slots=4, width=192, steps=3, moe={"ffn_size": 256}, strategy=SHARDED)
    for num_ranks in (2, 3, 4):
        path = tmp_path / f"{num_ranks}.ckpt"
        run_ranks(num_ranks, fit, job, None, str(path))
        sizes = [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
        assert len(sizes) == num_ranks
        assert max(sizes) < 1.05 * sum(sizes) / num_ranks, sizes


def damaged(saved, tmp_path):
    import shutil

    copy = tmp_path / "copy.ckpt"
    shutil.copytree(saved[0], copy)
    return copy


def refuses(path):
    job = dataclasses.replace(FULL, strategy=SHARDED)
    module, trainer = Net(job), our_trainer(job)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=str(path))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_named(saved, tmp_path):
    """Anywhere in any file; ranks that did not see it refuse as well."""
    rng = np.random.default_rng(0)
    table = read_table(saved[0])
    for file in sorted(saved[0].iterdir()):
        for _ in range(4):
            copy = damaged(saved, tmp_path / f"{file.name}{rng.integers(1 << 30)}")
            at = int(rng.integers(file.stat().st_size))
            flip(copy / file.name, at)
            with pytest.raises(CheckpointError) as caught:
                check_folder(copy)
            if file.suffix == ".distcp":
                said = str(caught.value)
                holds = [
                    index.fqn
                    for index, info in table.storage_data.items()
                    if info.relative_path == file.name and info.offset <= at < info.offset + info.length
                ]
                assert any(name in said for name in holds)
                assert file.name in said
    copy = damaged(saved, tmp_path)
    first = sorted(copy.glob("*.distcp"))[0]
    flip(first, first.stat().st_size // 2)
    for said in run_ranks(2, refuses, copy):
        assert first.name in said


@pytest.mark.parametrize("what", ["cut", "gone", "no table", "no rest"])
def test_what_is_not_whole_is_refused(saved, tmp_path, what):
    copy = damaged(saved, tmp_path)
    file = copy / "__1_0.distcp"
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        {"gone": file, "no table": copy / TABLE, "no rest": copy / META}[what].unlink()
    for said in run_ranks(2, refuses, copy):
        assert str(copy) in said


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("code_ran"),))


@pytest.mark.parametrize("where", [TABLE, META])
def test_code_is_not_run(saved, tmp_path, monkeypatch, where):
    copy = damaged(saved, tmp_path)
    monkeypatch.chdir(tmp_path)
    if where == TABLE:
        (copy / TABLE).write_bytes(pickle.dumps(Code()))
        rest = torch.load(copy / META, weights_only=True)
        del rest["lightning_swiftmoe"]  # else the checksum would have refused it
        torch.save(rest, copy / META)
    else:
        torch.save({"callbacks": Code()}, copy / META)
    with pytest.raises(CheckpointError, match=r"holds (pathlib|builtins)"):
        check_folder(copy)
    assert not (tmp_path / "code_ran").exists()


def test_bad_arguments():
    from lightning_swiftmoe import SwiftMoEStrategy

    with pytest.raises(ValueError, match="checkpoint must be one of full, sharded, got 'shard'"):
        SwiftMoEStrategy(checkpoint="shard")
    with pytest.raises(ValueError, match="async_save=True needs checkpoint='sharded'"):
        SwiftMoEStrategy(async_save=True)
    with pytest.raises(ValueError, match="needs optimizer_state='decoupled'"):
        SwiftMoEStrategy(checkpoint="sharded", optimizer_state="bound")


# -- saving ------------------------------------------------------------------------------------------------------------


class SaveEveryStep(pl.Callback):
    """One folder a step, and the folder before it removed."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, module, *_):
        step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"{step}.ckpt")
        assert step == 1 or (self.folder / f"{step - 1}.ckpt" / META).is_file()
        trainer.strategy.remove_checkpoint(self.folder / f"{step - 2}.ckpt")


def fit_saving_every_step(job, folder):
    return fit(dataclasses.replace(job, callbacks=lambda: [SaveEveryStep(folder)]))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_saved_while_training_goes_on(tmp_path, num_ranks):
    """What is written is the step's, whatever later steps change; and training is as without it."""
    now, later = tmp_path / "now", tmp_path / "later"
    in_background = dataclasses.replace(FULL, strategy={**SHARDED, "async_save": True})
    expected = run_ranks(num_ranks, fit_saving_every_step, SAVES, str(now))
    got = run_ranks(num_ranks, fit_saving_every_step, in_background, str(later))
    assert got[0][0] == expected[0][0]
    assert sorted(path.name for path in later.iterdir()) == ["5.ckpt", "6.ckpt"]
    for name in ("5.ckpt", "6.ckpt"):
        check_folder(later / name)
        ours, theirs = read_folder(later / name), read_folder(now / name)
        assert same(ours["state_dict"], theirs["state_dict"])
        assert same(ours["optimizer_states"][0].read(), theirs["optimizer_states"][0].read())


def full_disk(job, folder, fails_on):
    """Whether training ended with an error, on a rank whose files do not get through."""
    if dist.get_rank() == fails_on:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(OSError, match=r"was not saved .*and is what it was before") as caught:
        fit_saving_every_step(job, folder)
    return str(caught.value)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("fails_on", [0, 1])
def test_a_full_disk(tmp_path, in_background, fails_on):
    """All ranks raise, and what was there before is there, whole."""
    job = dataclasses.replace(FULL, strategy={**SHARDED, "async_save": in_background}, width=24)
    old = tmp_path / "1.ckpt"
    run_ranks(2, fit, dataclasses.replace(job, steps=3), None, str(old))
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    said = run_ranks(2, full_disk, job, str(tmp_path), fails_on)
    assert said[0] == said[1]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]


def test_names_change_hands(tmp_path):
    """A folder over a folder, a file over a folder and a folder over a file."""
    path = tmp_path / "last.ckpt"
    for job, is_folder in ((SAVES, True), (SAVES, True), (FULL, False), (SAVES, True)):
        run_ranks(2, fit, job, None, str(path))
        assert path.is_dir() == is_folder
        assert [other.name for other in tmp_path.iterdir()] == ["last.ckpt"]
    check_folder(path)


def test_links_to_what_is_not_there_yet_are_refused():
    from lightning.pytorch.callbacks import ModelCheckpoint

    job = dataclasses.replace(FULL, strategy={**SHARDED, "async_save": True})
    job = dataclasses.replace(job, callbacks=lambda: [ModelCheckpoint(save_last="link")])
    for said in run_ranks(2, refusal, job):
        assert "save_last=True, which saves another" in said


def refusal(job):
    trainer = our_trainer(job, enable_checkpointing=True)
    with pytest.raises(ValueError) as caught:
        trainer.fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))
    return str(caught.value)
