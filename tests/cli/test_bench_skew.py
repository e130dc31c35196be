"""``swiftmoe bench skew``: all systems send the tokens where a workload says."""

import json

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from lightning_swiftmoe.cli._peers.job import Job, Plan
from lightning_swiftmoe.cli._peers.replay import LayerReplay, experts_of_tokens, loads_of_ranks, write_replay
from lightning_swiftmoe.cli._peers.with_lightning import BenchModule
from lightning_swiftmoe.cli.compose import prepare_hydra
from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.layers.moe import moe_layers
from lightning_swiftmoe.parallel.rehearsal import rehearse
from lightning_swiftmoe.simulate import GENERATORS, LoadTrace, Workload, generate
from tests.processes import swiftmoe

MODEL = [
    *("cluster=local_cpu", "model=tiny", "data.seq_len=32", "model.aux_loss_coef=0", "model.activation=swiglu"),
    *("model.top_k=2", "model.num_experts=8", "strategy.slots_per_rank=6", "optimizer.lr=0.005"),
]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_loads_are_whole_tokens(name, top_k):
    work = Workload(num_steps=5, num_layers=2, num_experts=6, tokens=3 * 40, top_k=top_k)
    trace = generate(name, work)
    loads = loads_of_ranks(trace, 7, 3, num_ranks=3, tokens=40)
    assert loads.shape == (7, 3, 3, 6)
    assert (loads.sum(axis=-1) == 40 * top_k).all()
    assert loads.min() >= 0
    assert loads.max() <= 40
    shares = trace.counts.sum(axis=2) / trace.counts.sum(axis=(2, 3))[..., None]
    assert np.abs(loads[:5, :2].sum(axis=2) / (3 * 40 * top_k) - shares).max() < 1.5 / 40
    assert (loads[5:, 2] == loads[:2, 0]).all()  # begun anew


def test_ranks_of_a_trace_keep_their_own_shares():
    counts = np.random.default_rng(0).integers(1, 50, (3, 2, 4, 6))
    trace = LoadTrace(counts, np.arange(3), top_k=1)
    loads = loads_of_ranks(trace, 3, 2, num_ranks=4, tokens=6000)
    shares = counts / counts.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(loads / 6000, shares, atol=1 / 6000)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_different_experts(seed):
    rng = np.random.default_rng(seed)
    tokens, top_k = int(rng.integers(1, 30)), int(rng.integers(1, 5))
    load = np.zeros(8, dtype=np.int64)
    for _ in range(tokens):
        load[rng.choice(8, top_k, replace=False, p=[0.5, 0.2, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02])] += 1
    experts = experts_of_tokens(load, top_k, rng.permutation(tokens))
    assert (np.bincount(experts.flatten(), minlength=8) == load).all()
    assert all(len(set(row)) == top_k for row in experts.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_planned_experts_are_the_highest(dtype):
    torch.manual_seed(0)
    planned = torch.stack([torch.stack([torch.randperm(8)[:3] for _ in range(50)]) for _ in range(2)])
    replay = LayerReplay(planned.to(torch.uint8))
    for step in range(2):
        logits = (3 * torch.randn(50, 8)).to(dtype).requires_grad_()
        preferred = replay.prefer(logits)
        assert (preferred.topk(3).indices.sort().values == planned[step].sort().values).all()
        among = torch.softmax(preferred.float().gather(1, planned[step]), dim=1)
        expected = torch.softmax(logits.float().gather(1, planned[step]), dim=1)
        torch.testing.assert_close(among, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0)
        preferred.sum().backward()
        assert (logits.grad == 1).all()
    with pytest.raises(ValueError, match="planned for 2 steps, one forward in each, and there is one more"):
        replay.prefer(logits)


def test_a_model_sends_its_tokens_there(tmp_path):
    prepare_hydra()
    with initialize_config_module("conf", version_base=None):
        config = compose("train", [*MODEL, "run_dir=."])
    loads = loads_of_ranks(generate("zipf", Workload(num_experts=8, top_k=2)), 2, 2, num_ranks=2, tokens=4 * 32)
    loads[:, :, 1] = loads[:, :, 1, ::-1]
    write_replay(tmp_path / "replay.npz", [loads[:1], loads[1:]], top_k=2)
    plan = Plan(0, 2, 0, False, 4, True, replay=str(tmp_path / "replay.npz"))
    for rank in range(2):
        job = Job("none", rank, 2, config, plan, tmp_path)
        gpt = job.build_replaying_gpt()
        for step, batch in enumerate(job.batches()):
            gpt.loss(batch).backward()
            for number, layer in enumerate(moe_layers(gpt).values()):
                assert (layer.pop_load().counts[0].numpy() == loads[step, number, rank]).all()
                assert layer.router.weight.grad.abs().max() > 0


def test_routing_is_replayed_only_once_training_has_begun(tmp_path):
    """On GPUs the strategy rehearses every layer with a few tokens of its own, to compile its kernels."""
    prepare_hydra()
    with initialize_config_module("conf", version_base=None):
        config = compose("train", [*MODEL, "run_dir=."])
    loads = loads_of_ranks(generate("one_hot", Workload(num_experts=8, top_k=2)), 1, 2, num_ranks=1, tokens=4 * 32)
    write_replay(tmp_path / "replay.npz", [loads], top_k=2)
    module = BenchModule(
        Job("ours", 0, 1, config, Plan(0, 1, 0, False, 4, True, replay=str(tmp_path / "replay.npz")), tmp_path)
    )
    layer = moe_layers(module)["net.blocks.0.ffn"]
    rehearse(layer, torch.float32, torch.device("cpu"))
    module.on_train_start()
    module.training_step(module.job.batches()[0], 0)
    assert (layer.pop_load().counts[0].numpy() == loads[0, 0, 0]).all()


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
def test_systems_train_alike_under_skew(tmp_path):
    counts = generate("drift", Workload(num_steps=30, num_experts=8, top_k=2)).counts
    LoadTrace(counts, 10 * np.arange(30), 2).save(tmp_path / "mine.npz")
    options = ["batch_per_rank=4", "steps=3", "settle=1", "warmup=2", "workloads=[one_hot,mine.npz@100]"]
    systems = "systems=[static,exact,ep]"
    status, text = swiftmoe(
        "bench", "skew", *MODEL, *options, systems, "hydra.run.dir=run", cwd=tmp_path, timeout_s=200
    )
    assert status == 0, text
    found = json.loads((tmp_path / "run/skew.json").read_text())
    for system in found["systems"].values():
        assert len(system["losses"]) == 2 + 3 * 4
        assert system["losses"] == pytest.approx(found["systems"]["static"]["losses"], rel=1e-5)
        assert list(system["step_ms"]) == ["balanced", "one_hot", "mine.npz@100"]
    assert found["options"]["workloads"] == ["one_hot", "mine.npz@100"]
    assert found["hottest_expert"]["balanced"] == 1
    assert found["hottest_expert"]["one_hot"] == 4  # of 8 experts one has half of all assignments
    load = counts.sum(axis=2)[11:14]
    hottest = (load.max(axis=-1) / load.mean(axis=-1)).mean()
    assert found["hottest_expert"]["mine.npz@100"] == pytest.approx(hottest, rel=0.02)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torchtitan", "deepspeed"])
def test_other_projects_send_them_there_too(tmp_path, peer):
    pytest.importorskip(peer, reason=f"needs lightning-swiftmoe[{peer}]")
    options = ["batch_per_rank=4", "steps=3", "settle=1", "warmup=2", "workloads=[zipf]", f"systems=[ep,{peer}]"]
    status, text = swiftmoe("bench", "skew", *MODEL, *options, "hydra.run.dir=run", cwd=tmp_path, timeout_s=200)
    assert status == 0, text
    systems = json.loads((tmp_path / "run/skew.json").read_text())["systems"]
    assert systems[peer]["losses"] == pytest.approx(systems["ep"]["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("workloads=[zip]", "workload 'zip' is neither a file nor one of balanced, zipf"),
        ("workloads=zipf", "workloads must be a list, got 'zipf': write workloads=[zipf]"),
        ("systems=[exakt]", "systems must be among static, last_step, exact, copies, ep, "),
        ("settle=-1", "settle must be an integer of at least 0, got -1"),
        ("steps=0", "steps must be an integer of at least 1, got 0"),
        ("model.num_experts=512", "routing is replayed for 1 to 256 experts, got 512 in 2 layers"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, word, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "skew", *MODEL, word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
