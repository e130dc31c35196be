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
        (["policies=[1]"], "unknown policy '1'"),
        (["policies=static"], "policies must be a list, got 'static': write policies=[static]"),
        (["policies=null"], "policies must be a list, got null: write policies=[...]"),
        (["steps=-1"], "steps must be null (all) or a positive integer, got -1"),
        (["steps=0"], "steps must be null (all) or a positive integer, got 0"),
        (["steps=2.5"], "steps must be null (all) or a positive integer, got 2.5"),
        (["steps=true"], "steps must be null (all) or a positive integer, got True"),
        (["num_ranks=0"], "num_ranks must be null (the whole cluster) or a positive integer, got 0"),
        (["cluster.num_nodes=0"], "cluster.num_nodes must be a positive integer, got 0"),
        (["offload=maybe"], "offload must be true or false, got 'maybe'"),
        (["spread=1"], "spread must be true or false, got 1"),
        (["published_baselines=maybe"], "published_baselines must be true or false, got 'maybe'"),
        (["adapt_model=maybe"], "adapt_model must be true or false, got 'maybe'"),
        (["report=maybe"], "report must be true or false, got 'maybe'"),
        (["trace=3"], "trace must be null or a file, got 3"),
        (["efficiency.compute=fast"], "efficiency.compute must be null or a number above zero, got 'fast'"),
        (["efficiency.compute=0"], "efficiency.compute must be null or a number above zero, got 0"),
        (["efficiency=null"], "efficiency must be a mapping such as {compute: 0.4}, got None"),
        (["workload=3"], "workload must be a mapping such as {num_steps: 100}, got 3"),
        (["workload.num_steps=-1"], "workload.num_steps must be a positive integer, got -1"),
        (["workload.tokens=true"], "workload.tokens must be a positive integer, got True"),
        (["workload.seed=-1"], "workload.seed must be an integer, zero or more, got -1"),
        (["workload.seed=1.5"], "workload.seed must be an integer, zero or more, got 1.5"),
        (["workload.skew=abc"], "workload.skew must be a number, zero or more, got 'abc'"),
        (["workload.pace=-1"], "workload.pace must be a number, zero or more, got -1"),
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
        (["capacity_factor=0"], "capacity_factor must be null (no token is dropped) or a number above zero, got 0"),
        (
            ["capacity_factor=abc"],
            "capacity_factor must be null (no token is dropped) or a number above zero, got 'abc'",
        ),
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_ranks=0"], "num_ranks must be null (the whole cluster) or a positive integer, got 0"),
        (["num_ranks=-4"], "num_ranks must be null (the whole cluster) or a positive integer, got -4"),
        (["num_ranks=2.5"], "num_ranks must be null (the whole cluster) or a positive integer, got 2.5"),
        (["num_ranks=abc"], "num_ranks must be null (the whole cluster) or a positive integer, got 'abc'"),
        (["cluster.num_nodes=0"], "cluster.num_nodes must be a positive integer, got 0"),
        (["cluster.devices=0"], "cluster.devices must be a positive integer, got 0"),
        (["cluster.devices=auto"], "cluster.devices must be a positive integer, got 'auto'"),
        (["cluster.hardware.num_nodes=0"], "hardware.num_nodes must be a positive integer, got 0; correct it in the"),
        (["tokens_per_rank=0"], "tokens_per_rank must be a positive integer, got 0"),
        (["tokens_per_rank=true"], "tokens_per_rank must be a positive integer, got True"),
        (["hf_seq_len=0"], "hf_seq_len must be a positive integer, got 0"),
        (["hf_recompute=maybe"], "hf_recompute must be true or false, got 'maybe'"),
        (["offload=maybe"], "offload must be true or false, got 'maybe'"),
        (["skew=abc"], "skew must be a number, zero or more, got 'abc'"),
        (["skew=-1"], "skew must be a number, zero or more, got -1"),
        (
            ["capacity_factor=abc"],
            "capacity_factor must be null (no token is dropped) or a number above zero, got 'abc'",
        ),
        (["efficiency.network=-1"], "efficiency.network must be null or a number above zero, got -1"),
        (["hf=/nowhere", "model=tiny"], "hf=/nowhere brings a model of its own: leave out model=tiny, or hf"),
        (["hf=/nowhere", "model.top_k=2"], "hf=/nowhere brings a model of its own: leave out model.top_k=2, or hf"),
        (["hf=/nowhere", "capacity_factor=2"], "hf=/nowhere drops no token: leave out capacity_factor=2"),
        (["hf_seq_len=512"], "hf_seq_len=512 is for a model by hf=FOLDER: name one, or leave it out"),
    ],
)
def test_what_plan_refuses(tmp_path, capfd, overrides, message):
    assert run(tmp_path, *overrides, command=plan) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


@pytest.mark.parametrize("overrides", [["num_ranks=16"], ["cluster.num_nodes=2"], ["cluster.devices=2"]])
def test_a_smaller_cluster(capfd, overrides):
    """``devices`` and ``num_nodes`` of a cluster are those of its hardware: ``train`` and ``plan`` read the same."""
    assert plan.main(["cluster=h100_8x8", *overrides]) == 0
    assert "on 16 x NVIDIA H100 SXM" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (plan, ["recipes=quickstart"], "swiftmoe plan takes no recipe"),
        (plan, ["recipes=hf/mixtral_8x7b"], "swiftmoe plan takes no recipe"),
        (plan, ["data=text"], "there is no group 'data' here; there are model, cluster"),
        (plan, ["recipe=quickstart"], "there is no 'recipe'; at the top has model, cluster, hf, "),
        (plan, ["+recipes=quickstart"], "recipes=quickstart sets 'data', and the groups here are model, cluster"),
        (simulate, ["recipes=quickstart"], "recipes=quickstart sets 'data', and the groups here are model, cluster, "),
        (simulate, ["strategy=paper"], "there is no group 'strategy' here; there are model, cluster, recipes"),
        (simulate, ["recipe=paper/scaling"], "there is no 'recipe'; did you mean 'recipes'?"),
        (simulate, ["recipes=scalin"], "; did you mean 'paper/scaling'?"),
    ],
)
def test_groups_that_a_command_has_not(tmp_path, capfd, command, overrides, message):
    assert run(tmp_path, *overrides, command=command) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert message in line
    assert "append" not in line


def test_what_plan_says_instead_of_a_recipe_works(capfd):
    assert plan.main(["recipes=quickstart"]) == 2
    advice = capfd.readouterr().err.partition("as in swiftmoe plan ")[2].split()
    assert len(advice) > 1
    assert plan.main(advice) == 0


def test_a_refused_simulation_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["steps=-1"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert simulate.main([*SMALL, "policies=[static]"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    for mistake in ("steps=-1", "policies=static", "policies=[nope]", "num_ranks=0"):
        assert simulate.main([*SMALL, mistake]) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_plan_leaves_the_current_folder(tmp_path, monkeypatch):
    """Its run folder is the one that the user stands in, which may be empty."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert plan.main(["num_ranks=0"]) == 2
    assert (tmp_path / "empty").is_dir()


def test_jobs_of_a_sweep_keep_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(["-m", *SMALL, "slots_per_rank=2,3", "policies=[static]"]) == 0
    found = sorted(path.parent.name for path in tmp_path.rglob("simulation.json"))
    assert found == ["0", "1"]
