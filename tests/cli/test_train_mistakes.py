"""Every mistake in an override is one line on stderr and status 2, before any rank is started."""

import os

import pytest
import torch.distributed as dist

from lightning_swiftmoe.cli import train


@pytest.fixture(autouse=True)
def _no_rank_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.top_k=1", "Key 'modle' not in 'TrainConf'"),
        ("model.topk=1", "Key 'topk' not in 'GPTConf'"),
        ("optimizer.speed=3", "optimizer.speed: Key 'speed' is not in struct"),
        ("trainer.max_step=3", "trainer.max_step: Key 'max_step' is not in struct"),
        ("model.num_experts=many", "model.num_experts: Value 'many' of type 'str' could not be converted to Integer"),
        ("policy.every_n_steps=1.5", "policy.every_n_steps: Value '1.5' of type 'float' could not be converted"),
        ("policy.every_n_steps=0", "every_n_steps must be a positive integer, got 0"),
        ("trainer.max_steps", "missing EQUAL"),
        ("recipes=fastest", "Could not find 'recipes/fastest'; there are gpt_large_a100_16x1, "),
        ("policy=hottest", "Could not find 'policy/hottest'; there are auto, balanced, "),
        ("policy.name=hottest", "unknown placement policy 'hottest'; there are auto, balanced, "),
        ("model=gpt5", "Could not find 'model/gpt5'; there are deepseek_v3, "),
        ("optimizer._target_=torch.optim.Fastest", "Error loading 'torch.optim.Fastest'"),
        ("+optimizer.speed=3", "AdamW.__init__() got an unexpected keyword argument 'speed'"),
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
        ("data.batch_size=15", "batch_size = 15 is for all ranks together and must divide by 2"),
        ("data.seq_len=129", "data.seq_len = 129 is more than model.max_seq_len = 128 can read"),
        ("data.limit_bytes=50", "a split of 50 tokens has no window of 128 + 1"),
        ("data=text", "data=text needs data.source.paths=[FILE or FOLDER, ...], got none"),
        ("data.tokenizer=words", "tokenizer must be bytes or bpe, got 'words'"),
    ],
)
def test_one_line_and_status_2(capfd, override, message):
    assert train.main(["recipes=quickstart", *override.split()]) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""
    assert not dist.is_initialized()
    assert "LOCAL_RANK" not in os.environ


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


def test_a_missing_package(capfd, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert train.main(["recipes=quickstart", "data=hf"]) == 2
    assert capfd.readouterr().err == "error: data=hf needs the datasets package: pip install 'lightning-swiftmoe[hf]'\n"


def test_where_a_mistake_came_from_on_request(monkeypatch):
    monkeypatch.setenv("SWIFTMOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="top_k must be"):
        train.main(["recipes=quickstart", "model.top_k=9"])
