"""``swiftmoe checkpoint info`` and ``verify``: what they say, and their exit status."""

import lightning
import pytest
import torch

from lightning_swiftmoe.checkpoint.io import WholeCheckpointIO
from lightning_swiftmoe.checkpoint.sums import KEY
from lightning_swiftmoe.cli import main as cli
from lightning_swiftmoe.cli.checkpoint_info import facts
from tests.checkpoint.damage import flip, of_others, tensor_bytes
from tests.jobs import Job, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "two.ckpt"
    run_ranks(2, train, Job(steps=3, slots=3, precision="32-true"), None, str(path))
    return path


def test_info(path, capsys):
    assert cli.main(["checkpoint", "info", str(path)]) == 0
    facts = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()[1:])
    facts = {name: fact.strip() for name, fact in facts.items()}
    # Dense: 6 x 6 + 6, two routers of 5 x 6, 6 + 1. Experts: two layers of 5 times 5 x 6 and 6 x 5.
    dense, experts = 42 + 2 * 30 + 7, 2 * 5 * (30 + 30)
    assert facts.pop("path").startswith(str(path)[:20])
    assert facts == {
        "step": "3",
        "epoch": "1",
        "weights": f"{dense + experts} numbers, {4 * (dense + experts) / 1024:.1f} KiB in 10 tensors",
        "experts": f"5 in each of 2 layers; {experts} numbers, {4 * experts / 1024:.1f} KiB",
        "optimizer 0": f"{(8 * (dense + experts) + 40) / 1024:.1f} KiB for 10 parameters (step, exp_avg, exp_avg_sq)",
        "made by": f"Lightning {lightning.__version__}, 2 rank(s)",
        "callbacks": "ExpertRebalancer",
    }


def test_info_counts_biases_of_experts():
    shapes = {"moe.experts.up_proj": (5, 3, 2), "moe.experts.up_proj_bias": (5, 3), "moe.experts.norm.weight": (2,)}
    found = facts({"state_dict": {name: torch.zeros(shape) for name, shape in shapes.items()}})
    assert found["experts"] == "5 in each of 1 layers; 45 numbers, 180 B"


def test_info_of_what_others_made(tmp_path, capsys):
    """Names that rich would take for markup, keys of ours with something else in them, states of any kind."""
    path = tmp_path / "[red].ckpt"
    odd = {"state_dict": {"a": torch.zeros(2)}, "optimizer_states": [3], "callbacks": {"A{'b': [1]}": {}}, KEY: "x"}
    torch.save(odd, path)
    assert cli.main(["checkpoint", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "[red].ckpt" in out.replace("\n", "").replace(" ", "")
    assert "2 numbers, 8 B in 1 tensors" in out
    assert "Lightning of unknown version, without our checksums" in out


def test_verify_a_good_one(path, tmp_path, capsys):
    assert cli.main(["checkpoint", "verify", str(path)]) == 0
    # 10 weights, 3 of the optimizer for each, and 3 that say where the random numbers of each rank stand.
    assert capsys.readouterr().out == f"{path}: 46 tensors as they were saved; all weights are finite\n"
    torch.save(of_others(path), tmp_path / "others.ckpt")
    assert cli.main(["checkpoint", "verify", str(tmp_path / "others.ckpt")]) == 0
    assert "46 tensors read, but whoever saved them made no checksums" in capsys.readouterr().out


def test_verify_bad_ones(path, tmp_path, capsys):
    bad = tmp_path / "bad.ckpt"
    flip(path, bad, 8 * tensor_bytes(path)[0][0])
    for command in ("verify", "info"):
        assert cli.main(["checkpoint", command, str(bad)]) == 1
        assert capsys.readouterr().err == (
            f"error: {bad} was damaged since it was written: 'state_dict.inp.weight'; choose another checkpoint\n"
        )
    WholeCheckpointIO().save_checkpoint({"state_dict": {"a": torch.tensor([1.0, float("nan")])}}, bad)
    assert cli.main(["checkpoint", "verify", str(bad)]) == 1
    assert capsys.readouterr().err == f"error: {bad} holds NaN or Inf in 'a': choose an earlier checkpoint\n"
    assert cli.main(["checkpoint", "info", str(bad)]) == 0


@pytest.mark.parametrize("command", ["info", "verify"])
def test_mistakes(command, capsys):
    usage = f"usage: swiftmoe checkpoint {command} PATH"
    for args, said in (
        ([], "expected the path of one checkpoint, got 0 arguments"),
        (["a", "b"], "expected the path of one checkpoint, got 2 arguments"),
        (["nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
    ):
        assert cli.main(["checkpoint", command, *args]) == 2
        assert capsys.readouterr().err == f"error: {said}; {usage}\n"
    assert cli.main(["checkpoint", command, "--help"]) == 0
    assert capsys.readouterr().out == f"{usage}\n"


def test_half_a_command(capsys):
    assert cli.main(["checkpoint"]) == 0
    assert "checkpoint verify" in capsys.readouterr().out
    assert cli.main(["checkpoint", "verfy"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: unknown command 'checkpoint verfy'; did you mean 'checkpoint verify'?"]
