"""Every mistake in an override is one line on stderr and status 2, before any rank is started."""

import logging
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from lightning_swiftmoe.cli import train
from lightning_swiftmoe.cli._folders import remove_unused


@pytest.fixture(autouse=True)
def _no_rank_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.top_k=1", "there is no 'models'; did you mean 'model'?"),
        ("recipe=quickstart", "there is no 'recipe'; did you mean 'recipes'?"),
        ("nothing=1", "there is no 'nothing'; at the top has model, cluster, policy, "),
        ("+nothing=1", "there is no 'nothing'; at the top has model, cluster, policy, "),
        ("model.topk=1", "there is no 'model.topk'; did you mean 'model.top_k'?"),
        ("model.num_expert=8", "there is no 'model.num_expert'; did you mean 'model.num_experts'?"),
        ("+model.num_expert=8", "there is no 'model.num_expert'; did you mean 'model.num_experts'?"),
        ("optimizer.speed=3", "there is no 'optimizer.speed'; optimizer has lr, betas, weight_decay"),
        ("optimizer.ep=1e-6", "there is no 'optimizer.ep'; did you mean '+optimizer.eps'?"),
        ("strategy.slot_per_rank=2", "there is no 'strategy.slot_per_rank'; did you mean 'strategy.slots_per_rank'?"),
        ("trainer.max_step=3", "there is no 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("trainer.limit_train_batches=3", "so far: add it by +trainer.limit_train_batches=VALUE"),
        ("trainer.max_steps=abc", "trainer.max_steps must be an integer, got 'abc'"),
        ("trainer.max_steps=10.5", "trainer.max_steps must be an integer, got 10.5"),
        ("trainer.max_steps=null", "trainer.max_steps must be an integer, got null"),
        ("trainer.gradient_clip_val=abc", "trainer.gradient_clip_val must be a number or null, got 'abc'"),
        ("trainer.enable_progress_bar=maybe", "trainer.enable_progress_bar must be true or false or null, got 'maybe'"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be a positive integer, got 0"),
        ("trainer.precision=16-true", "precision '16-true' is not supported; choose one of 32-true, "),
        ("data.batch_size=abc", "data.batch_size must be an integer, got 'abc'"),
        ("module.warmup_steps=x", "module.warmup_steps must be an integer, got 'x'"),
        ("optimizer.lr=abc", "optimizer.lr must be a number, got 'abc'"),
        ("optimizer.lr=-1", "optimizer torch.optim.AdamW: Invalid learning rate: -1"),
        ("optimizer.betas=0.9", "optimizer.betas must be a list, got 0.9"),
        ("optimizer.betas=[0.9]", "optimizer torch.optim.AdamW: "),
        ("optimizer=adam", "Could not find 'optimizer/adam'; there are adamw, sgd; did you mean 'adamw'?"),
        ("optimizer._target_=torch.optim.Muon", "Muon has no argument 'betas': leave it out by ~optimizer.betas"),
        ("optimizer._target_=torch.optim.Muon ~optimizer.betas", "return [Muon(dense), AdamW(experts)] from"),
        ("strategy.timeout=abc", "strategy.timeout must be a number, got 'abc'"),
        ("strategy.transport=ncl", "transport must be one of auto, gloo, nccl, symmetric, got 'ncl'; did you mean"),
        ("strategy.trust_optimizer=maybe", "strategy.trust_optimizer must be true or false, got 'maybe'"),
        ("strategy=swiftmo", "Could not find 'strategy/swiftmo'; there are flexmoe, flexmoe_10, "),
        ("callbacks.rebalancer.every_n_steps=2.5", "callbacks.rebalancer.every_n_steps must be an integer, got 2.5"),
        ("cluster=slurm", "-m hydra/launcher=submitit_slurm (pip install 'lightning-swiftmoe[slurm]')"),
        ("cluster=slurm hydra/launcher=submitit_slurm", "submitit_slurm': pip install 'lightning-swiftmoe[slurm]'"),
        ("cluster=local_gpu", "accelerator = gpu, but torch finds no GPU here: choose cluster=local_cpu"),
        ("cluster.start_method=threads", "start_method must be one of popen, spawn, fork, forkserver, got 'threads'"),
        ("run_dir=/dev/null/run", "run_dir = /dev/null/run cannot be made: Not a directory"),
        ("ckpt_path=/nowhere/last.ckpt", "ckpt_path = /nowhere/last.ckpt is not there: give a file in a run's"),
        ("--recipes=quickstart", "unknown option '--recipes=quickstart': overrides have no dashes, as in recipes="),
        ("trainer.max_steps:3", "cannot read 'trainer.max_steps:3': an override is KEY=VALUE without spaces"),
        ("recipes=quickstrat", "; did you mean 'quickstart'?"),
        ("model.aux_loss_coef=null", "model.aux_loss_coef cannot be null"),
        ("model.num_layers=0", "num_layers must be a positive integer, got 0"),
        ("model.score=sofmax", "score must be one of softmax, sigmoid, got 'sofmax'; did you mean 'softmax'?"),
        ("data=text data.source.paths=/nowhere", "/nowhere is no file, and no folder with files like '*.txt'"),
        ("model.num_experts=many", "model.num_experts: Value 'many' of type 'str' could not be converted to Integer"),
        ("policy.every_n_steps=1.5", "policy.every_n_steps: Value '1.5' of type 'float' could not be converted"),
        ("policy.every_n_steps=0", "every_n_steps must be a positive integer, got 0"),
        ("trainer.max_steps", "cannot read 'trainer.max_steps': an override is KEY=VALUE without spaces, as in "),
        ("recipes=fastest", "Could not find 'recipes/fastest'; there are bench/qwen3_cut, bench/skew32, "),
        ("recipes=hf/mixtral", ", hf/mixtral_8x7b, hf/olmoe_1b_7b, "),
        ("recipes=hf/mixtral", "; did you mean 'hf/mixtral_8x7b'?"),
        ("recipes=small16", "; did you mean 'bench/small16'?"),
        ("recipes=paper/fig7", "; did you mean 'paper/fig7_table3'?"),
        ("bench=step", "there is no group 'bench' here; there are module, model, data, cluster, "),
        ("policy=hottest", "Could not find 'policy/hottest'; there are auto, balanced, "),
        ("policy.name=hottest", "unknown placement policy 'hottest'; there are auto, balanced, "),
        ("model=gpt5", "Could not find 'model/gpt5'; there are deepseek_v3, "),
        ("optimizer._target_=torch.optim.Fastest", "Error loading 'torch.optim.Fastest'"),
        ("+optimizer.speed=3", "optimizer.speed: AdamW has no argument 'speed'"),
        ("optimizer._target_=torch.optim.Adafactor ~optimizer.betas", "Adafactor cannot be sharded: it factors"),
        ("model.top_k=9", "top_k must be 1 .. num_experts = 8, got 9"),
        ("model.activation=tanh", "activation must be one of swiglu, "),
        ("model.num_heads=5", "num_heads = 5 must divide hidden_size = "),
        ("strategy.slots_per_rank=3", "the smallest slots_per_rank that works is 4"),
        ("strategy.slots_per_rank=half", 'slots_per_rank must be "auto" or a positive integer'),
        ("strategy.expert_parallel_size=3", "expert_parallel_size = 3 must divide the 2 rank(s) of the job: choose"),
        ("strategy.expert_parallel_size=1 strategy.slots_per_rank=4", "1 ranks x 4 slots hold 4 experts"),
        ("strategy.expert_parallel_size=1 strategy.optimizer_state=bound", "needs optimizer_state='decoupled'"),
        ("cluster=virtual_16x1 strategy.expert_parallel_size=4", "a virtual cluster is one expert group"),
        ("cluster=virtual_16x1 module.on_meta=true", "module.on_meta = true needs ranks that share experts"),
        ("data.batch_size=15", "batch_size = 15 is for all ranks together and must divide by 2"),
        ("data.seq_len=129", "data.seq_len = 129 is more than the 128 that the model can read"),
        ("callbacks.rebalancer.trace=trace.npz", "trace must be a file named *.npy.gz, got 'trace.npz'"),
        ("callbacks.rebalancer.trace=/dev/null/trace.npy.gz", "trace=/dev/null/trace.npy.gz cannot be written ("),
        ("data.limit_bytes=50", "a split of 50 tokens has no window of 128 + 1"),
        ("data=text", "data=text needs data.source.paths=[FILE or FOLDER, ...], got none"),
        ("data.tokenizer=words", "tokenizer must be bytes or bpe, or a folder that has one, got 'words'"),
    ],
)
def test_one_line_and_status_2(capfd, override, message):
    assert train.main(["recipes=quickstart", *override.split()]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    if "run_dir" not in override:  # the last thing before training
        assert captured.out == ""
    assert not dist.is_initialized()
    assert "LOCAL_RANK" not in os.environ
    assert list(Path.cwd().iterdir()) == []  # nothing ran, and no folder says otherwise


def test_who_goes_on_after_a_refusal_may_log():
    """The log file of the folder that is gone is nobody's any more."""
    assert train.main(["recipes=quickstart", "model.top_k=9"]) == 2
    logging.getLogger("afterwards").error("a line")
    assert list(Path.cwd().iterdir()) == []


def test_jobs_that_are_refused_leave_no_folder():
    assert train.main(["-m", "recipes=quickstart", "model.top_k=9,99"]) == 2
    assert [path.name for path in Path.cwd().rglob("*") if path.is_file()] == ["multirun.yaml"]
    assert len(list(Path.cwd().rglob("*"))) == 4  # multirun, date, time, the file


def test_folders_of_others_stay():
    mistake = ["recipes=quickstart", "model.top_k=9"]
    for name in ("empty", "full"):
        Path(name).mkdir()
    Path("full", "notes.txt").write_text("mine")
    assert train.main([*mistake, "hydra.run.dir=empty"]) == 2
    assert train.main([*mistake, "hydra.run.dir=full"]) == 2
    assert train.main([*mistake, "hydra.run.dir=full/new"]) == 2
    assert {path.name for path in Path.cwd().iterdir()} == {"empty", "full"}
    assert Path("full", "notes.txt").read_text() == "mine"
    assert not Path("full", "new").exists()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_another_rank_leaves_the_folder_to_the_first(monkeypatch, name):
    folder = Path.cwd() / "run"
    (folder / "hydra").mkdir(parents=True)
    remove_unused(folder, "hydra", {name: "1"})
    assert folder.exists()
    remove_unused(folder, "hydra", {name: "0"})
    assert not folder.exists()


def test_nothing_else_is_said_where_somebody_imported_the_other_lightning(capfd):
    import pytorch_lightning

    assert pytorch_lightning.__version__
    assert train.main(["recipes=quickstart", "+optimizer.speed=3"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_a_user_may_vouch_for_an_optimizer():
    with pytest.raises(pytest.fail.Exception, match="training began"):
        train.main(["optimizer._target_=torch.optim.Adafactor", "~optimizer.betas", "strategy.trust_optimizer=true"])


def test_a_checkpoint_to_go_on_from(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, ckpt_path: given.append(ckpt_path))
    path = tmp_path / "last.ckpt"
    path.touch()
    assert train.main(["recipes=quickstart", f"ckpt_path={path}", "report=false"]) == 0
    assert given == [path]


def test_a_rank_that_somebody_started_is_left_alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(pytest.fail.Exception, match="training began"):
        train.main(["cluster.num_nodes=2"])


def test_a_missing_package(capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert train.main(["recipes=quickstart", "data=hf"]) == 2
    assert capfd.readouterr().err == "error: data=hf needs the datasets package: pip install 'lightning-swiftmoe[hf]'\n"


def test_where_a_mistake_came_from_on_request(monkeypatch):
    monkeypatch.setenv("SWIFTMOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="top_k must be"):
        train.main(["recipes=quickstart", "model.top_k=9"])
