"""The command line: one error line and status 2 for each mistake, files for what works."""

import json

import numpy as np
import pytest

from lightning_swiftmoe.cli import plan, simulate

SMALL = ["steps=3", "report=false"]


def run(tmp_path, *overrides, command=simulate):
    extra = [*SMALL, f"output={tmp_path / 'out'}"] if command is simulate else []
    return command.main([*extra, *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policies=[nope]"], "unknown policy 'nope'"),
        (["policies=[]"], "no policies"),
        (["cluster=nope"], "Could not find 'cluster/nope'"),
        (["cluster=local_cpu"], "'hardware:' section is needed, such as cluster=a100_16x1; this one does not say"),
        (["cluster=virtual_16x1"], "a single process that drops tokens as 16 ranks would"),
        (["cluster.hardware.nic_Gbps=-1"], "hardware.nic_Gbps must be a positive number, got -1"),
        (["~cluster.hardware.hbm_gb"], "the cluster's hardware lacks hbm_gb"),
        (["slots_per_rank=0"], "slots_per_rank must be"),
        (["workload.num_experts=64", "slots_per_rank=1"], "smallest slots_per_rank that works is 4"),
        (["trace=/nowhere.npz"], "no trace at"),
        (["synthetic=nope"], "unknown generator 'nope'"),
        (["+workload.colour=1"], "workload: "),
        (["+efficiency.speed=2"], "unknown efficiency speed"),
        (["capacity_factor=0"], "capacity_factor must be above zero"),
        (["adapt_model=false", "workload.num_experts=8"], "the trace routes to 8 experts, the model has 16"),
    ],
)
def test_one_line_and_status_2(tmp_path, capfd, overrides, message):
    assert run(tmp_path, *overrides) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((2, 3), dtype=int), "[steps, layers, ranks, experts]"),
        (np.full((2, 1, 16, 4), -1), "must not be negative"),
        (np.zeros((2, 1, 16, 4), dtype=int), "all zero"),
        (np.ones((2, 1, 5, 4), dtype=int), "the trace has 5 ranks, the cluster 16"),
    ],
)
def test_bad_traces(tmp_path, capfd, counts, message):
    np.savez(tmp_path / "t.npz", counts=counts, steps=np.arange(len(counts)), meta=np.array('{"top_k": 1}'))
    assert run(tmp_path, f"trace={tmp_path / 't.npz'}") == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_run_writes_what_it_prints(tmp_path, capfd):
    assert run(tmp_path, "policies=[static,proportional]", "slots_per_rank=4", "num_ranks=8") == 0
    content = json.loads((tmp_path / "out" / "simulation.json").read_text())
    survival = content["policies"]["proportional"]["summary"]["mean_survival"]
    assert f"{survival:.2%}" in capfd.readouterr().out
    assert content["settings"]["hardware"]["num_nodes"] == 8
    assert content["settings"]["efficiency"]["compute"]["source"]
    assert len((tmp_path / "out" / "simulation.csv").read_text().splitlines()) == 3


def test_a_trace_of_other_ranks_can_be_spread(tmp_path):
    np.savez(
        tmp_path / "t.npz",
        counts=np.arange(1, 121).reshape(3, 2, 5, 4),
        steps=np.arange(3),
        meta=np.array('{"top_k": 1}'),
    )
    assert run(tmp_path, f"trace={tmp_path / 't.npz'}", "spread=true") == 0


def test_plan(capfd):
    assert plan.main(["model=gpt_small", "slots_per_rank=4"]) == 0
    out = capfd.readouterr().out
    assert "It fits." in out
    assert "Smallest number of ranks: 1, with 16 slots each." in out
    assert plan.main(["tokens_per_rank=0"]) == 2
    assert "tokens_per_rank must be a positive integer, got 0" in capfd.readouterr().err


def test_jobs_of_a_sweep_keep_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["-m", *SMALL, "slots_per_rank=2,3", "policies=[static]"]) == 0
    found = sorted(path.parent.name for path in tmp_path.rglob("simulation.json"))
    assert found == ["0", "1"]
