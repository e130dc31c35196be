"""``swiftmoe bench step peers=[deepspeed]``: what stands side by side trains the same model."""

import json

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lightning_swiftmoe.cli import _deepspeed_peer, bench_step
from lightning_swiftmoe.cli.compose import prepare_hydra
from lightning_swiftmoe.models import GPTConfig
from tests.cli.test_bench_step import SMALL, bench

pytest.importorskip("deepspeed", reason="needs lightning-swiftmoe[deepspeed]")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PEERS = ["peers=[deepspeed]", "rounds=1", "strategy.slots_per_rank=4", *SMALL]


def results(folder, *args):
    status, text = bench(folder, *PEERS, *args)
    assert status == 0, text
    return json.loads((folder / "run/step.json").read_text())


@pytest.mark.parametrize("num_ranks", [2, 4])  # every expert on one rank; replicas on two
def test_without_drops_deepspeed_and_our_strategy_train_alike(tmp_path, num_ranks):
    # SGD, large steps and no clipping: a gradient of another scale would show.
    found = results(
        tmp_path,
        f"cluster.devices={num_ranks}",
        *("warmup=0", "steps=6", "module.warmup_steps=0", "model.aux_loss_coef=0"),
        *("optimizer=sgd", "optimizer.lr=0.3", "trainer.gradient_clip_val=0"),
    )
    losses = found["deepspeed"]["losses"]
    assert len(losses) == 6
    assert max(losses) - min(losses) > 1
    assert found["static"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert found["swiftmoe"]["losses"] == pytest.approx(losses, rel=1e-4)
    assert {system["survival"] for system in found.values()} == {1.0}


def test_the_first_step_drops_as_many_as_our_static_policy(tmp_path):
    # Equal weights and equal tokens; only which of an expert's surplus is dropped may differ, and only behind the
    # first MoE layer can that change another layer's routing.
    found = results(tmp_path, "model.capacity_factor=1.0", "warmup=0", "steps=1", "model.moe_every=2")
    assert found["deepspeed"]["survival"] == pytest.approx(found["static"]["survival"], rel=1e-6)
    assert found["deepspeed"]["survival"] < 1


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("model.top_k=2", "model.top_k=1, got 2"),
        ("strategy.slots_per_rank=3", "cannot put 8 experts on 2 ranks with 3 each"),
        ("trainer.precision=bf16-mixed", "trainer.precision=32-true, got bf16-mixed"),
    ],
)
def test_what_deepspeed_cannot_do_alike_is_said_before_any_rank_starts(tmp_path, argument, words):
    status, text = bench(tmp_path, *PEERS, argument)
    assert status == 2
    (line,) = text.splitlines()
    assert words in line


def topk_by_position(values, k, dim):
    """``torch.topk`` with equal values in the order they stand, which torch leaves open."""
    found = values.sort(dim=dim, descending=True, stable=True)
    return found.values.narrow(dim, 0, int(k)), found.indices.narrow(dim, 0, int(k))


def test_with_drops_too_they_train_alike_once_ties_go_by_position(monkeypatch):
    overrides = [
        *("cluster.devices=2", "strategy.slots_per_rank=4", "strategy.capacity_scope=rank", "policy=static"),
        *("model.capacity_factor=1.0", "model.aux_loss_coef=0", "optimizer=sgd", "module.warmup_steps=0"),
        "callbacks.rebalancer.trace=null",
        *(word for word in SMALL if word.startswith("data.")),
        "run_dir=unused",
    ]
    prepare_hydra()
    with initialize_config_module("lightning_swiftmoe.conf", version_base="1.3"):
        config = compose("train", overrides)
    bench_step.train_and_nothing_else(config, 6)
    model = GPTConfig(**OmegaConf.to_container(config.model, resolve=True))
    monkeypatch.setattr(torch, "topk", topk_by_position)  # ranks are forked and inherit it
    theirs = _deepspeed_peer.train_steps(config, model, 0, 6, 0)
    ours = bench_step.train_steps(config, model, bench_step.Options([], 0, 6, 1))
    assert theirs.survival == pytest.approx(ours.survival, abs=1e-3)
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-4)
    assert max(ours.survival) < 1
