"""``swiftmoe bench step peers=[...]``: systems in processes of their own, on gloo ranks."""

import itertools
import json
import threading
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_swiftmoe.cli._peers import meter as meter_module
from lightning_swiftmoe.cli._peers.driver import Row, summary
from lightning_swiftmoe.cli._peers.job import Job, Plan, made_up_text, write_batches
from lightning_swiftmoe.cli._peers.meter import Meter, Result
from lightning_swiftmoe.cli._peers.systems import System, expand, parse, slots_of
from lightning_swiftmoe.cli._peers.table import with_differences
from lightning_swiftmoe.cli._peers.worker import Turn, forget_earlier_run, wait_for_files
from tests.cli.test_bench_step import bench

SMALL = [
    *("data.seq_len=32", "data.batch_size=8", "warmup=1", "steps=5", "rounds=1"),
    *("model.aux_loss_coef=0", "model.activation=swiglu", "model.top_k=2", "optimizer.lr=0.005"),
]

PLAN = Plan(warmup=2, steps=3, profiled=0, stacks=False, batch_per_rank=1, reshard=True)


def run(folder, *args):
    status, text = bench(folder, *SMALL, *args)
    assert status == 0, text
    return json.loads((folder / "run/step.json").read_text()), text


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_systems_train_alike(tmp_path):
    found, text = run(tmp_path, "peers=[ours_ep,ddp]")
    systems = found["systems"]
    losses = systems["ours_ep"]["losses"]
    assert len(losses) == 6
    assert max(losses) - min(losses) > 0.2
    ddp = systems["ddp"]
    assert ddp["losses"] == pytest.approx(losses, rel=1e-5)
    assert ddp["loss_reference"] == "ours_ep"
    assert ddp["loss_difference"] < 1e-5
    assert ddp["gpus"] == 2
    assert "ours_ep: mean" in text


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_rounds_add_up_beside_a_peer_that_fails(tmp_path):
    found, text = run(tmp_path, "peers=[ours1+strategy.nonsense=1,none]", "rounds=2", "--profile")
    system = found["systems"]["none"]
    assert (system["gpus"], system["rounds"], len(system["steps_ms"])) == (1, 2, 10)
    assert system["tokens_per_s"] * system["wall_ms"] / 1e3 == pytest.approx(4 * 32)
    assert (tmp_path / "run/peers/none-0/trace_rank0.json.gz").exists()  # the first is profiled
    assert not (tmp_path / "run/peers/none-1/trace_rank0.json.gz").exists()
    assert "SwiftMoEStrategy got an unexpected keyword" in found["systems"]["ours1+strategy.nonsense=1"]["error"]
    assert "ours1+strategy.nonsense=1: TypeError: " in text


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torchtitan", "deepspeed"])
def test_other_projects_train_alike(tmp_path, peer):
    pytest.importorskip(peer, reason=f"needs lightning-swiftmoe[{peer}]")
    found, _ = run(tmp_path, f"peers=[ours_ep,{peer}]", "trainer.gradient_clip_val=0.5")
    assert found["systems"][peer]["losses"] == pytest.approx(found["systems"]["ours_ep"]["losses"], rel=1e-5)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_systems_race_to_a_loss_on_text(tmp_path):
    found, text = run(tmp_path, "peers=[none,ours_ep]", "text=true", "target_loss=5.3", "steps=40")
    alone, ours = (found["systems"][name] for name in ("none", "ours_ep"))
    for result in (alone, ours):
        means = np.convolve(result["losses"], np.full(20, 1 / 20), mode="valid")
        assert result["steps_to_loss"] == 20 + np.flatnonzero(means <= 5.3)[0]
        minutes = result["steps_to_loss"] * result["wall_ms"] / 60e3
        assert result["minutes_to_loss"] == pytest.approx(minutes)
    assert "steps to loss" in text


def test_timed_steps_begin_when_the_machine_is_quiet(monkeypatch, tmp_path):
    """Waiting for that is part of no step: a second each here, and a thousand to wait."""
    clock = itertools.count()
    waited = []
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: float(next(clock) + 1000 * len(waited)))
    job = Job("none", 0, 1, OmegaConf.create({"cluster": {"accelerator": "cpu"}}), PLAN, tmp_path)
    meter = Meter(job, lambda result: None, lambda: waited.append(True))
    for step in range(PLAN.total_steps):
        meter.before_step(step)
        assert waited == ([True] if step >= PLAN.warmup else [])
        meter.after_step(step, torch.zeros(()))
    assert meter.result.steps_ms == [1000.0] * PLAN.steps
    assert meter.result.block_s < 10


def test_files_are_waited_for(tmp_path):
    paths = [tmp_path / "first", tmp_path / "second"]
    looked = []

    class Looks(threading.Thread):
        """Makes the second only when the first was there for a while and nobody went on."""

        def run(self):
            paths[0].touch()
            looked.append(went_on.wait(0.2))
            paths[1].touch()

    went_on = threading.Event()
    thread = Looks()
    thread.start()
    wait_for_files([str(path) for path in paths])
    went_on.set()
    thread.join()
    assert looked == [False]
    with pytest.raises(RuntimeError, match=r"have not loaded their packages within 0 s.*third"):
        wait_for_files([str(tmp_path / "third" / "loaded.rank0")], limit_s=0.1)


def test_an_earlier_run_in_the_folder_gives_no_turns(tmp_path):
    Turn(1234, []).give(tmp_path)
    for name in ("loaded.rank0", "result.rank1.json", "error.rank0.txt", "log.rank0.txt"):
        (tmp_path / name).touch()
    forget_earlier_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.rank0.txt"]


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_the_same_folder_twice(tmp_path):
    """Nobody trains beside the system whose turn it is: results come one after the other."""
    for _ in range(2):
        run(tmp_path, "peers=[none,ours1]")
        results = [tmp_path / "run/peers" / name / "result.rank0.json" for name in ("none-0", "ours1-0")]
        turn = (tmp_path / "run/peers/ours1-0/turn.json").stat().st_mtime
        assert results[0].stat().st_mtime < turn < results[1].stat().st_mtime


def test_text_comes_as_in_training(tmp_path):
    settings = {"_target_": "lightning_swiftmoe.data.TextData", "seq_len": 32, "batch_size": 8, "limit_bytes": 1500}
    source = {"_target_": "lightning_swiftmoe.data.FileSource", "paths": [str(tmp_path)], "pattern": "*.txt"}
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    config = OmegaConf.create({"data": settings | {"source": source}})
    plan = Plan(warmup=1, steps=11, profiled=0, stacks=False, batch_per_rank=2, reshard=True)
    write_batches(tmp_path / "batches.npy", config, plan, num_ranks=4)
    loader = instantiate(config.data).train_dataloader()
    expected = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        expected += list(loader)
    assert len(loader) == 5
    assert (np.load(tmp_path / "batches.npy") == torch.stack(expected[:12]).numpy()).all()


@pytest.mark.distributed
def test_behind_the_budget_nothing_starts_and_what_runs_is_stopped(tmp_path):
    status, text = bench(tmp_path, *SMALL, "peers=[none,ours1]", "budget_s=1.5", f"output={tmp_path}/there.json")
    assert status == 2, text
    found = json.loads((tmp_path / "there.json").read_text())["systems"]
    assert found["none"]["error"] == "stopped after 1 s"
    assert found["ours1"]["error"] == "skipped: the budget of 2 s is spent"


def test_entries_of_peers():
    assert expand(["ours", "ours+policy.name=static", "none"], "auto") == [
        *("ours_all", "ours_ep", "ours_all+policy.name=static", "ours_ep+policy.name=static", "none")
    ]
    assert expand(["ours", "deepspeed"], 4) == ["ours", "deepspeed", "deepspeed_cap1"]
    system = parse("ours_ep+strategy.transport=nccl+policy.every_n_steps=2", 4)
    assert system.overrides == {"strategy.transport": "nccl", "policy.every_n_steps": 2}
    assert (system.name, system.num_ranks) == ("ours_ep", 4)
    assert parse("none", 4).num_ranks == parse("ours1", 4).num_ranks == 1


def test_slots_of_our_variants():
    assert slots_of("ours_all", 16, 2) == slots_of("ours1", 16, 1) == 16
    assert slots_of("ours_ep", 16, 2) == 8
    assert slots_of("ours_ep", 16, 3) == 6


@pytest.mark.skipif(find_spec("torchtitan") is not None, reason="torchtitan is installed")
def test_a_package_that_lacks():
    assert parse("torchtitan", 2).missing() == "not installed: pip install 'lightning-swiftmoe[torchtitan]'"
    assert parse("ddp", 2).missing() is None


def test_a_step_takes_as_long_as_on_the_slowest_rank():
    fast = Result([1.0, 2.0, 3.0], block_s=0.006, losses=[2.0, 1.0], allocated_gib=1.0)
    slow = Result([2.0, 1.0, 9.0], block_s=0.012, losses=[2.0, 1.0], allocated_gib=3.0)
    found = summary(Row(System("ddp", "ddp", 2), [[fast, slow]]), tokens_per_rank=100)
    assert found["steps_ms"] == [2.0, 2.0, 9.0]
    assert found["step_ms"] == pytest.approx({"mean": 13 / 3, "median": 2.0, "worst": 9.0})
    assert found["tokens_per_s"] == pytest.approx(3 * 200 / 0.012)
    assert found["allocated_gib"] == 3.0


def test_losses_are_compared_with_ours_on_as_many_ranks():
    rows = {
        "none": {"gpus": 1, "losses": [4.0]},
        "ddp": {"gpus": 2, "losses": [2.0, 1.1]},
        "ours_ep": {"gpus": 2, "losses": [2.0, 1.0]},
        "fsdp2": {"gpus": 2, "error": "no"},
    }
    found = with_differences(rows)
    assert found["ddp"]["loss_difference"] == pytest.approx(0.1)
    assert found["none"]["loss_reference"] == "none"
    assert "loss_difference" not in found["fsdp2"]


def test_batches_can_be_learnt_and_every_second_token_follows():
    tokens = made_up_text((3, 33), 256, torch.Generator().manual_seed(0))
    assert torch.equal(tokens[:, 1::2], (tokens[:, 0:32:2] * 7 + 3) % 256)
    assert tokens.min() >= 0
    assert tokens.max() < 256
