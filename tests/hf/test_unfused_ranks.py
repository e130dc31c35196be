"""Experts that are not fused, on several ranks: gpt_oss, and every variant of transformers' experts interface."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_swiftmoe import WeightEMA
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.meta_start import materialize_dense, materialize_experts
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from tests.hf.modules import EXPERTS, WIDTH, ModelOfVariants, filled
from tests.hf.test_strategy import (
    Causal,
    Checkpointed,
    Compiled,
    Mixed,
    compare,
    data,
    job_of,
    listen,
    refused,
    train,
    train_alone,
)
from tests.interpreter import run_interpreted
from tests.jobs import SaveAt, full, largest_error, make_trainer, our_trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class InFp64(Causal):
    """With norms that do not round to fp32: one third of a gradient rounds otherwise than the gradient."""

    def __init__(self, job, family):
        super().__init__(job, family)
        for part in list(self.model.modules()):
            for name, norm in part.named_children():
                if type(norm).__name__.endswith("RMSNorm"):
                    wide = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                    wide.weight = norm.weight
                    setattr(part, name, wide)


def test_three_ranks():
    compare(3, job_of(batch=6), "gpt_oss", InFp64)


VARIANTS = {
    "clip_and_accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "bound": {"strategy": {"optimizer_state": "bound"}, "trainer": {"gradient_clip_val": 0.05}},
    "offload": {"strategy": {"offload_optimizer": True}},
    "exact_with_copies": {"strategy": {"split": "exact", "transient_copies": 2}, "slots": 3},
    "groups_of_one": {"strategy": {"expert_parallel_size": 1}},
    "redundancy": {"strategy": {"redundancy": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_training(variant, tmp_path):
    job = job_of(**VARIANTS[variant])
    compare(2, dataclasses.replace(job, trainer={**job.trainer, "default_root_dir": tmp_path}), "gpt_oss")


def test_activation_checkpointing():
    compare(2, job_of(), "gpt_oss", Checkpointed)


@pytest.mark.exhaustive
def test_compiled():
    compare(1, job_of(), "gpt_oss", Compiled)


def test_groups_of_ranks():
    compare(4, job_of(strategy={"expert_parallel_size": 2}), "gpt_oss")


# -- every variant of the interface ------------------------------------------------------------------------------------


def alternating(self, pre):
    """A gate of a class's own, with gate and up columns in turn."""
    return torch.tanh(pre[..., ::2]) * (pre[..., 1::2] + 1)


def with_slope(self, pre):
    """It reads a Parameter of the module that is no expert's."""
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate * self.slope) * up


INTERFACE = [
    {"has_bias": True},
    {"is_transposed": True},
    {"is_concatenated": False, "gate": alternating},
    {"has_post_expert_norm": True},
    {"has_gate": False, "has_bias": True, "act": torch.tanh},
    {"gate": with_slope},
]


class OfVariants(Causal):
    """A layer of each."""

    variants = INTERFACE

    def __init__(self, job, family):
        super(Causal, self).__init__()
        self.job, self.implementation = job, "eager"
        self.losses, self.gradients, self.seen = [], [], []
        self.model = ModelOfVariants(self.variants)
        self.model.set_experts_implementation("eager")
        self.model.blocks[-1].experts.slope = nn.Parameter(torch.empty(1))
        filled(self.model, torch.float64)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_variant_of_the_interface(num_ranks):
    compare(num_ranks, job_of(batch=6), None, OfVariants)


def test_every_variant_bound_to_hosts():
    compare(2, job_of(strategy={"optimizer_state": "bound"}), None, OfVariants)


class WithAnIdleParameter(OfVariants):
    """Nothing reads the slope."""

    variants = ({},)


def test_a_parameter_that_nothing_reads_is_refused():
    for message in run_ranks(2, refused, job_of(), None, WithAnIdleParameter):
        assert "got a Parameter slope, which neither its gate nor its activation reads" in message


# -- what users do with biases in fit ----------------------------------------------------------------------------------

FUNCTIONS = {
    "norm": lambda p: p.norm(),
    "norm_of_each": lambda p: p.norm(dim=1),
    "sum": lambda p: p.sum(),
    "mean_over_experts": lambda p: p.mean(dim=0),
    "largest": lambda p: p.abs().max(),
    "softmax": lambda p: p.softmax(dim=1),
    "one_expert": lambda p: p[1],
    "some_rows": lambda p: p[:, 2:5],
    "transposed": lambda p: 2 * p.T + 1,
    "product": lambda p: p @ torch.ones(p.shape[1], 2, dtype=p.dtype),
    "sorted": lambda p: p.sort(dim=1).values,
}


class LooksAtBiases(OfVariants):
    """Compares functions of parts with those of the whole, and writes by index."""

    variants = ({"has_bias": True},)

    def __init__(self, job, family):
        super().__init__(job, family)
        del self.model.blocks[-1].experts.slope

    def on_before_optimizer_step(self, optimizer):
        experts = self.model.blocks[0].experts
        for bias in (experts.gate_up_proj_bias, experts.down_proj_bias):
            for value in (bias.detach(), bias.grad):
                whole = full(value)
                for name, function in FUNCTIONS.items():
                    got, want = full(function(value)), function(whole)
                    assert torch.allclose(got, want, rtol=1e-12, atol=0), name

    def on_train_batch_end(self, *args):
        bias = self.model.blocks[0].experts.gate_up_proj_bias
        with torch.no_grad():
            bias[:, 1] = 0.25
            bias.data.clamp_(-0.5, 0.5)


def test_functions_and_edits_of_biases():
    """24 and 8 rows on five ranks are cut 5, 5, 5, 5, 4 and 2, 2, 2, 2, 0."""
    job = job_of(steps=2, batch=5)
    alone = train_alone(job, None, LooksAtBiases).state_dict()
    for result in run_ranks(5, train, job, None, LooksAtBiases):
        assert largest_error(result["weights"], alone) < 1e-9


# -- precisions and checkpoints ----------------------------------------------------------------------------------------


class LooksAtResidents(Causal):
    """What products and sums take."""

    def on_before_optimizer_step(self, optimizer):
        residents = self.trainer.strategy.engine.layers[0].hosted.residents()
        self.seen.append({key: resident.dtype for key, resident in residents.items()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_autocast_biases_stay_as_they_are(accumulate):
    """As in one process: products run in bf16, and what is added to them is fp32. They travel in two messages."""
    job = job_of(
        precision="bf16-mixed",
        optimizer=lambda module: torch.optim.SGD(module.parameters(), 0.05),
        trainer={"accumulate_grad_batches": accumulate},
    )
    alone = train_alone(dataclasses.replace(job, precision="32-true"), "gpt_oss").state_dict()
    start = Causal(job, "gpt_oss").state_dict()
    biases = [name for name in alone if name.endswith("proj_bias")]
    for result in run_ranks(2, train, job, "gpt_oss", LooksAtResidents):
        for key, dtype in result["seen"][-1].items():
            assert dtype == (torch.float32 if key.endswith("bias") else torch.bfloat16)
        moved = {name: result["weights"][name] - start[name] for name in biases}
        assert largest_error(moved, {name: alone[name] - start[name] for name in biases}) < 0.3


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_resumed_on_another_number_of_ranks(tmp_path, kind):
    path = str(tmp_path / "half.ckpt")
    job = job_of(batch=6, strategy={"checkpoint": kind})
    saving = dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 2)])
    whole = run_ranks(2, train, saving, "gpt_oss", InFp64)[0]["weights"]
    for num_ranks in (1, 3):
        resumed = run_ranks(num_ranks, train, job, "gpt_oss", InFp64, path)[0]
        assert len(resumed["losses"]) == 2
        assert largest_error(resumed["weights"], whole) < 1e-9


def averages(trainer, module, batches):
    """Of the weights of four steps."""
    trainer.fit(module, batches)
    (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, WeightEMA))
    ema.apply_to(module)
    return module.state_dict()


def averages_of_rank(job):
    return averages(our_trainer(job), Causal(job, "gpt_oss"), data(job, dist.get_rank(), dist.get_world_size()))


def test_weight_averages():
    job = job_of(callbacks=lambda: [WeightEMA(0.8)])
    expected = averages(make_trainer(job, callbacks=job.callbacks()), Causal(job, "gpt_oss"), data(job))
    for found in run_ranks(2, averages_of_rank, job):
        assert largest_error(found, expected) < 1e-9


# -- where other layers plan on the device -----------------------------------------------------------------------------


def train_by_plan(job, family):
    """What was trained, and what was said of the host."""
    setup._device_exchanges = lambda transport, tokens, control, bound: (NcclRows(tokens, bound), None)
    said = listen()
    result = train(job, family, Mixed)
    return result["weights"], [line for line in said if "on the host" in line]


@pytest.mark.parametrize(("family", "num_lines"), [("gpt_oss", 1), ("qwen3_moe", 0)])
def test_tokens_of_unfused_experts_are_planned_on_the_host(family, num_lines):
    """Beside a layer of ours, whose rows are added up in fp32 on its way."""
    alone = train_alone(job_of(), family, Mixed).state_dict()
    results = run_ranks(2, train_by_plan, job_of(), family)
    for weights, _ in results:
        assert largest_error(weights, alone) < 1e-5
    assert [len(lines) for _, lines in results] == [num_lines, 0]
    for line in results[0][1]:
        assert line.startswith("tokens of GptOssExperts are planned on the host, which is slower")


@pytest.mark.exhaustive
def test_their_state_travels_through_symmetric_memory():
    pytest.importorskip("triton")
    run_interpreted("tests.hf.symmetric_unfused", "32-true", "bf16-mixed")


# -- the meta device ---------------------------------------------------------------------------------------------------


def test_what_experts_share_is_made_on_every_rank():
    """Their own Parameters are not, and a Parameter that nobody initialises is named."""
    with torch.device("meta"):
        model = ModelOfVariants(INTERFACE)
    materialize_dense(model, seed=1)
    norm = model.blocks[3].experts.post_expert_norm
    assert torch.equal(norm.weight, torch.ones(WIDTH))
    left = {name for name, param in model.named_parameters() if param.is_meta}
    assert left == {name for name, _ in model.named_parameters() if "_proj" in name}
    materialize_experts(model, 1, Communicator())
    for name, param in model.named_parameters():
        assert not param.is_meta
        if "_proj" in name:
            assert param.shape[0] == EXPERTS
            assert bool(param.any()) != name.endswith("bias"), name
    with torch.device("meta"):
        model.blocks[-1].experts.slope = nn.Parameter(torch.empty(1))
    with pytest.raises(ValueError, match=r"blocks\.5\.experts\.slope was built on the meta device and nobody"):
        materialize_dense(model, seed=1)
