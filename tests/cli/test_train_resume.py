"""``swiftmoe train`` that is stopped and goes on is the run that nobody stopped."""

import csv
import fcntl

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_swiftmoe.cli.main import main
from lightning_swiftmoe.trace_file import read_trace
from tests.processes import swiftmoe

QUICK = ["recipes=quickstart", "data.limit_bytes=60000", "trainer.enable_progress_bar=false", "report=false"]


def train(cwd, *args):
    """Exit code and output of ``swiftmoe train`` in a process of its own."""
    return swiftmoe("train", *args, cwd=cwd)


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def weights(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    common = [*QUICK, "trainer.max_steps=6", "cluster.start_method=fork"]
    code, text = train(tmp_path, *common, "hydra.run.dir=whole")
    assert code == 0, text
    stop = {"_target_": "tests.cli.signals.SignalInStep", "name": "SIGTERM", "step": 3, "rank": 1}
    stopped = [f"+callbacks.stop.{key}={value}" for key, value in stop.items()]
    code, text = train(tmp_path, *common, *stopped, "hydra.run.dir=cut")
    assert code == 143, text
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert f"stopped by a signal, saved as step-3.ckpt: swiftmoe train resume={cut} goes on" in text
    assert "Traceback" not in text
    moved = cut.rename(tmp_path / "moved")
    code, text = train(tmp_path, "resume=moved")
    assert code == 0, text
    assert losses(moved) == losses(whole)
    steps, expected_steps = read_trace(moved / "trace.npy.gz"), read_trace(whole / "trace.npy.gz")
    assert steps["steps"].tolist() == list(range(1, 7))
    assert np.array_equal(steps["counts"], expected_steps["counts"])
    resumed, expected = weights(moved, 6), weights(whole, 6)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "moved", "log.txt"}


@pytest.fixture
def run_folder(tmp_path):
    """Of a run that somebody composed and saved a checkpoint of; nobody trained it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step-7.ckpt").touch()
    config = {
        "model": {"num_experts": 8},
        "trainer": {"max_steps": 20, "devices": 2},
        "cluster": {"devices": 2},
        "callbacks": {"checkpoint": {"dirpath": "/before/checkpoints"}},
        "run_dir": "/before",
        "resume": None,
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def composed(**changes):
    config = OmegaConf.create({"model": {"num_experts": 8}, "trainer": {"max_steps": 20}, "cluster": {"devices": 2}})
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def test_paths_follow_the_folder(run_folder):
    from lightning_swiftmoe.cli.resume import resumed_config

    config = resumed_config(composed(), run_folder, [f"resume={run_folder}"])
    assert config.run_dir == config.resume == str(run_folder)
    assert config.callbacks.checkpoint.dirpath == str(run_folder / "checkpoints")


def test_what_may_change_and_what_may_not(run_folder):
    from lightning_swiftmoe.cli.resume import resumed_config

    same = ["model.num_experts=8", "cluster.devices=4", "trainer.max_steps=30", "hydra.run.dir=x"]
    asked = composed(cluster__devices=4, trainer__devices=4, trainer__max_steps=30)
    config = resumed_config(asked, run_folder, same)
    assert (config.cluster.devices, config.trainer.max_steps, config.model.num_experts) == (4, 30, 8)
    assert config.trainer.devices == 4
    other = composed(model__num_experts=16, optimizer__lr=0.5)
    with pytest.raises(ValueError, match=r"model.num_experts was 8, not 16; optimizer.lr was None, not 0.5. Leave"):
        resumed_config(other, run_folder, ["model=other", "+optimizer.lr=0.5"])


def one_line(capsys, *args):
    assert main(["train", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_without_a_run_or_without_a_checkpoint(tmp_path, run_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "resume=nowhere: no run there, it has no config.yaml" in one_line(capsys, "resume=nowhere")
    (run_folder / "checkpoints" / "step-7.ckpt").unlink()
    assert "the run has saved no checkpoints/step-*.ckpt" in one_line(capsys, f"resume={run_folder}")


def test_a_run_that_is_at_its_end(tmp_path, run_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = one_line(capsys, f"resume={run_folder}", "trainer.max_steps=7")
    assert line.endswith("the run is at step 7 of trainer.max_steps = 7; set it to more to go on")


def test_two_runs_in_one_folder(tmp_path, run_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = [*QUICK, "cluster.virtual_ranks=2", "cluster.devices=1", f"hydra.run.dir={run_folder}"]
    assert f"{run_folder} holds a run already: resume={run_folder} goes on, hydra.run.dir sets" in one_line(
        capsys, *here
    )
    with (run_folder / ".run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another run trains in {run_folder}" in one_line(capsys, *here)


def test_a_run_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    line = one_line(capsys, *QUICK, "hydra.run.dir=file/inside")
    assert line == "error: file/inside cannot be written to (Not a directory): set hydra.run.dir to another folder"
