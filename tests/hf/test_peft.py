"""PEFT around transformers models under the strategy: adapters train as in one process; of experts they are refused."""

from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe.hf import NAME
from tests.hf.families import model_of
from tests.hf.test_strategy import Causal, compare, data, job_of, refused
from tests.jobs import full, our_trainer
from tests.ranks import run_ranks

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.distributed

FAMILY = "qwen3_moe"
ON_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(model, **targets):
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **targets))
    return wrapped.to(model.dtype)  # adapters of 32 bits are PEFT's default


class Adapted(Causal):
    targets: ClassVar = {"target_modules": ["q_proj", "v_proj"]}

    def __init__(self, job, family):
        super().__init__(job, family)
        self.model = adapted(self.model, **self.targets)

    def configure_optimizers(self):
        return torch.optim.AdamW([param for param in self.parameters() if param.requires_grad], lr=0.01)


class ExpertsToo(Adapted):
    """Adapters of dense layers, and experts that train as they are."""

    def __init__(self, job, family):
        super().__init__(job, family)
        for name, param in self.model.named_parameters():
            if "experts" in name:
                param.requires_grad_()


class OnExperts(Adapted):
    targets: ClassVar = {"target_modules": ["q_proj"], "target_parameters": ON_EXPERTS}


class SavedExperts(Adapted):
    targets: ClassVar = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("module_class", [Adapted, ExpertsToo])
def test_adapters_train_as_in_one_process(num_ranks, module_class):
    compare(num_ranks, job_of(policy="random"), FAMILY, module_class)


def train_and_save(job, folder):
    trainer, module = our_trainer(job), Adapted(job, FAMILY)
    folder = folder / str(dist.get_rank())

    def save(*_):
        module.model.save_pretrained(folder / str(trainer.global_step))

    module.on_train_batch_end = save
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    module.model.save_pretrained(folder / "end")
    return {name: full(param) for name, param in module.model.named_parameters() if "lora_" in name}


def test_adapters_are_saved_in_fit_and_behind_it(tmp_path):
    job = job_of(steps=2)
    trained = run_ranks(2, train_and_save, job, tmp_path)
    base = Causal(job, FAMILY).model
    for rank, expected in enumerate(trained):
        for stage in ("2", "end"):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / str(rank) / stage)
            found = {name: param for name, param in loaded.named_parameters() if "lora_" in name}
            assert found.keys() == expected.keys()
            for name, param in found.items():
                torch.testing.assert_close(param.double(), expected[name], rtol=1e-6, atol=0)  # saved as 32 bits
            base = loaded.unload()


@pytest.mark.parametrize(
    ("module_class", "wrapper"), [(OnExperts, "ParamWrapper"), (SavedExperts, "ModulesToSaveWrapper")]
)
def test_adapted_experts_are_refused_on_several_ranks(module_class, wrapper):
    for message in run_ranks(2, refused, job_of(), FAMILY, module_class):
        assert f"the experts of Qwen3MoeExperts: got them inside PEFT's {wrapper}, which would see" in message
        assert "adapt other layers (target_modules)" in message


@pytest.mark.filterwarnings("ignore:OnExperts has no MoE layer")
def test_on_one_rank_they_are_the_models_own_business():
    compare(1, job_of(), FAMILY, OnExperts)


def gradients(implementation):
    """Of adapters on experts, with no strategy."""
    model = adapted(model_of(FAMILY, implementation, torch.float64), target_parameters=ON_EXPERTS)
    ids = torch.arange(3, 21).view(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


def test_adapters_on_experts_in_one_process():
    want, got = gradients("eager"), gradients(NAME)
    assert got.keys() == want.keys()
    assert any("experts" in name for name in got)
    for name, grad in want.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(got[name], grad, rtol=1e-6, atol=1e-9)
