"""``swiftmoe train`` from the outside: a process of its own, with ranks of its own."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

from lightning_swiftmoe.models import GPTModule
from lightning_swiftmoe.report.runs import system_of
from lightning_swiftmoe.simulate import load_trace
from lightning_swiftmoe.trace_file import read_trace
from tests.processes import swiftmoe

QUICK = ["recipes=quickstart", "data.limit_bytes=100000", "trainer.enable_progress_bar=false"]


def check_run_folder(folder, steps, policy):
    complete = {"config.yaml", "metrics.csv", "manifest.json", "trace.npy.gz", "checkpoints", "hydra", "report.html"}
    assert {path.name for path in folder.iterdir()} == {*complete, ".run.lock"}
    assert "Load of every rank" in (folder / "report.html").read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert system_of(config) == policy
    assert config["run_dir"] == str(folder)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == steps
    assert 4 < losses[0] < 6
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert any(file["name"] == "os.py" for file in files)

    trace = read_trace(folder / "trace.npy.gz")
    assert trace["counts"].shape == (steps, 2, 2, 8)  # steps, layers, ranks, experts
    assert (
        trace["counts"].sum(axis=3) == config["data"]["batch_size"] // 2 * config["data"]["seq_len"]
    ).all()  # every rank routed its half of the batch
    processed = trace["rank_load"].sum(axis=(1, 2)) / trace["counts"].sum(axis=(1, 2, 3))
    logged = [float(row["moe/token_survival"]) for row in rows if row["moe/token_survival"]]
    assert processed == pytest.approx(logged)
    assert load_trace(folder / "trace.npy.gz").num_steps == steps
    assert trace["steps"].tolist() == list(range(1, steps + 1))
    assert json.loads(str(trace["meta"]))["slots_per_rank"] == 8

    (path,) = (folder / "checkpoints").glob("*.ckpt")
    module = GPTModule.load_from_checkpoint(path, model=config["model"])
    width, hidden = config["model"]["hidden_size"], config["model"]["ffn_size"]
    assert module.gpt.blocks[0].ffn.experts.down_proj.shape == (8, width, hidden)
    assert module.gpt.loss(torch.randint(256, (2, 17)).to(module.device)).isfinite()
    return trace


@pytest.mark.distributed
@pytest.mark.slow
def test_quickstart_leaves_a_complete_run_folder(tmp_path):
    code, text = swiftmoe("train", *QUICK, "trainer.max_steps=3", cwd=tmp_path)
    assert code == 0, text
    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/*/config.yaml"))
    check_run_folder(folder, 3, "exact")
    for wanted in ("what will run", "2, 8 slots each", "what happened", "token survival", "weight phase"):
        assert wanted in text
    assert str(folder.relative_to(tmp_path)) in text
    for noise in ("Warning", "Tip:", "GPU available", "litlogger", "Traceback"):
        assert noise not in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.distributed
@pytest.mark.slow
def test_a_sweep_leaves_one_folder_for_each_job(tmp_path):
    # Ranks that are started by a command line must know which of the jobs they are of.
    sweep = [
        "-m",
        *QUICK,
        "trainer.max_steps=2",
        "cluster.start_method=popen",
        "policy=static,proportional",
        "hydra.sweep.dir=sweep",
    ]
    code, text = swiftmoe("train", *sweep, cwd=tmp_path)
    assert code == 0, text
    traces = [
        check_run_folder(tmp_path / "sweep" / str(number), 2, policy)
        for number, policy in enumerate(["static", "proportional"])
    ]
    assert (traces[0]["replicas"] == 2).all()
    assert (traces[0]["replicas"][1] != traces[1]["replicas"][1]).any()
    assert np.array_equal(traces[0]["counts"][0], traces[1]["counts"][0])  # same weights, same batch
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "log.txt"}
