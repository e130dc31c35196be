"""``restarts=N``: a run that loses ranks ends as the run that lost none."""

from pathlib import Path

import pytest
import torch

from lightning_swiftmoe.cli import restarts
from lightning_swiftmoe.cli.main import main
from tests.cli.test_train_resume import QUICK, losses, train, weights
from tests.processes import ROOT

RUN = [
    *QUICK,
    "trainer.max_steps=9",
    "callbacks.checkpoint.every_n_steps=4",
    "cluster.start_method=fork",
    "cluster.devices=2",
]


def supervise(*argv, capfd):
    """Exit code, and what the supervisor in this process and the runs in theirs said."""
    code = main(["train", *argv])
    captured = capfd.readouterr()
    return code, captured.out + captured.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that loses nobody."""
    place = tmp_path_factory.mktemp("restarts")
    code, text = train(place, *RUN, "hydra.run.dir=whole")
    assert code == 0, text
    return place / "whole"


@pytest.fixture
def killed(tmp_path, monkeypatch, capfd):
    """Trains with kills, by step the rank that is killed, and gives the folder and what was said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(kills, *args):
        callback = {"_target_": "tests.cli.signals.KillOnce", "where": tmp_path, "kills": kills}
        words = [f"+callbacks.kills.{key}={value}" for key, value in callback.items()]
        code, text = supervise(*RUN, *words, *args, "hydra.run.dir=killed", capfd=capfd)
        assert code == 0, text
        return tmp_path / "killed", text

    return run


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_ranks(tmp_path, whole, killed):
    """Before the first checkpoint, and behind it; the first rank, and another."""
    folder, text = killed("{2:1,6:0}", "restarts=2")
    assert "restart 1 of 2, from the start: nothing is saved yet" in text
    assert "restart 2 of 2, from step-4.ckpt" in text
    assert {path.name for path in tmp_path.glob("killed-in-*")} == {"killed-in-2", "killed-in-6"}
    assert losses(folder) == losses(whole)
    expected = weights(whole, 9)
    assert all(torch.equal(weights(folder, 9)[name], value) for name, value in expected.items())


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ranks_that_are_left_go_on(whole, killed):
    """Without a checkpoint, from the step that failed, and with as many of them as share a batch."""
    folder, text = killed("{3:1}", "restarts=1", "strategy.redundancy=2")
    assert "second owner" in " ".join(text.split())
    assert "rank(s) [1] are gone: those left have saved" in text
    assert "restart 1 of 1, from step-3.ckpt" in text
    went_on, expected = losses(folder), losses(whole)
    assert went_on[:3] == expected[:3]
    assert [step for step, _ in went_on] == [step for step, _ in expected]
    # One rank drops other tokens than two do.
    assert [float(loss) for _, loss in went_on] == pytest.approx([float(loss) for _, loss in expected], rel=0.05)


def test_a_mistake_is_not_made_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    code, text = supervise(*QUICK, "restarts=5", "model.num_expert=3", capfd=capfd)
    assert code == 2
    assert "restart" not in text
    assert text.count("error:") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["restarts=many"], "restarts must be a number from 0, got 'many'"),
        (["restarts=1", "-m", "policy=static,proportional"], "restarts are for one run"),
    ],
)
def test_mistakes(argv, said, capsys):
    assert main(["train", *argv]) == 2
    assert said in capsys.readouterr().err


def test_torchrun_starts_it_once_more(tmp_path):
    argv = ["recipes=quickstart", f"hydra.run.dir={tmp_path}"]
    first = {
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "RANK": "0",
    }
    again = {**first, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert restarts.restarted(argv, {}) == restarts.restarted(argv, first) == argv
    config = tmp_path / "config.yaml"
    config.touch()
    assert restarts.restarted(argv, {**again, "RANK": "1"}) == argv
    assert config.exists()
    assert restarts.restarted(argv, again) == argv
    assert not config.exists()
    config.touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-3.ckpt").touch()
    assert restarts.restarted(argv, again) == ["recipes=quickstart", f"resume={tmp_path}"]
    assert config.exists()
    with pytest.raises(ValueError, match=r"set hydra\.run\.dir=FOLDER"):
        restarts.restarted(["recipes=quickstart"], first)
    del first["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
    with pytest.raises(ValueError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        restarts.restarted(argv, first)
    assert restarts.restarted(["resume=there"], again) == ["resume=there"]


def test_the_folder_is_the_one_that_hydra_would_make(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert restarts._folder(["resume=null", "hydra.run.dir=a"]) == tmp_path / "a"
    assert restarts._folder(["resume=b", "hydra.run.dir=a"]) == tmp_path / "b"
    assert restarts._folder([]).relative_to(Path.cwd()).parts[0] == "outputs"
