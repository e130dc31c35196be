"""Models of transformers on the meta device: drawn as they draw themselves, a part of the experts on each rank."""

import pytest
import torch
import torch.distributed as dist
import transformers

from lightning_swiftmoe.hf import NAME
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.find_layers import find_layers
from lightning_swiftmoe.parallel.meta_start import has_meta, materialize_dense, materialize_experts
from tests.hf.families import FAMILIES, config_of
from tests.hf.test_strategy import PARTLY_IN_FP32, Causal, data, job_of
from tests.jobs import largest_error, our_trainer
from tests.ranks import run_ranks


def meta_model(family, implementation="eager"):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            config_of(family), experts_implementation=implementation, attn_implementation="eager"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_distributed_as_the_models_own(family):
    if config_of(family) is None:
        pytest.skip("not in this version of transformers")
    torch.manual_seed(0)
    real = transformers.AutoModelForCausalLM.from_config(config_of(family))
    model = meta_model(family)
    assert has_meta(model)
    materialize_dense(model, seed=1)
    without_memory = {name for name, param in model.named_parameters() if param.is_meta}
    assert without_memory == {name for name, _ in model.named_parameters() if ".experts." in name}
    materialize_experts(model, 1, Communicator())
    assert not has_meta(model)
    assert find_layers(model)
    state, expected = model.state_dict(), real.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        ours = state[name]
        assert (ours.shape, ours.dtype) == (value.shape, value.dtype), name
        spread = float(value.float().std()) if value.numel() > 1 else 0.0
        if spread == 0:
            assert torch.equal(ours, value), name
        elif value.numel() > 100:
            assert float(ours.std()) == pytest.approx(spread, rel=0.25), name
            assert abs(float(ours.mean() - value.mean())) < 7 * spread / value.numel() ** 0.5, name
    for (name, buffer), (other, wanted) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, wanted), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        real.lm_head.weight is real.get_input_embeddings().weight
    )


class Meta(Causal):
    """Built by the hook that Lightning has for it."""

    def __init__(self, job, family):
        super(Causal, self).__init__()
        self.job, self.family = job, family
        self.losses, self.gradients, self.seen, self.model = [], [], [], None

    def configure_model(self):
        if self.model is None:
            self.model = meta_model(self.family, NAME if self.family == "nemotron_h" else "eager")

    def on_before_optimizer_step(self, optimizer):
        pass


def train(job, family, path):
    torch.manual_seed(11)
    trainer, module = our_trainer(job), Meta(job, family)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    trainer.save_checkpoint(path)
    return module.losses


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_ranks_train_what_one_trains(tmp_path, family):
    weights = []
    for num_ranks in (1, 2):
        path = tmp_path / str(num_ranks)
        run_ranks(num_ranks, train, job_of(), family, path)
        weights.append(torch.load(path, weights_only=False)["state_dict"])
    assert largest_error(*weights) < (1e-6 if family in PARTLY_IN_FP32 else 1e-9)


@pytest.mark.distributed
def test_a_model_without_a_seed_of_its_own_differs():
    first, second = meta_model("qwen3_moe"), meta_model("qwen3_moe")
    for model, seed in ((first, 1), (second, 2)):
        materialize_dense(model, seed)
        materialize_experts(model, seed, Communicator())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert sum(not torch.equal(one, other) for one, other in pairs) > 10
