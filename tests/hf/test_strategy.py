"""Models of transformers under the strategy, against one process without it: losses, gradients and weights in fp64."""

import dataclasses
import logging
from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import transformers
from lightning_utilities.core import rank_zero
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_swiftmoe import MoE
from lightning_swiftmoe.callback import only_rebalancer
from lightning_swiftmoe.hf import NAME
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.find_layers import find_layers
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from lightning_swiftmoe.virtual import VirtualCluster
from tests.hf.families import config_of, model_of
from tests.jobs import Batches, Job, SaveAt, full, largest_error, make_trainer, our_trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

BATCH, LENGTH = 4, 9
# Routers, or attention, that compute in fp32 whatever the model's dtype: gradients of all tokens of a backward are
# rounded together.
PARTLY_IN_FP32 = ("deepseek_v3", "nemotron_h", "qwen3_5_moe")


def adamw(module):
    """With an epsilon above what tiny gradients round to: Adam would make full steps of it."""
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1, eps=1e-4)


def job_of(**options):
    return Job(**{"slots": "auto", "optimizer": adamw, "steps": 4, "batch": BATCH, **options})


class Causal(pl.LightningModule):
    """Next-token training. The cross entropy is torch's: that of the models is rounded to fp32.

    Starts with eager experts, or by nemotron_h with ours: its eager ones add up in fp32.
    """

    def __init__(self, job, family):
        super().__init__()
        self.job, self.family = job, family
        self.implementation = NAME if family == "nemotron_h" else "eager"
        dtype = torch.float64 if job.precision == "64-true" else torch.float32
        self.model = model_of(family, self.implementation, dtype)
        self.losses, self.gradients, self.seen = [], [], []

    def loss(self, ids):
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer):
        if self.job.strategy.get("optimizer_state") == "bound":  # nobody may see the whole
            return
        self.gradients.append({name: full(p.grad).clone() for name, p in self.named_parameters() if p.grad is not None})

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.seen.append(loss.item())
        self.log("val", loss, sync_dist=True)

    def configure_optimizers(self):
        return self.job.optimizer(self)


class Ids(Batches):
    """Batches of tokens alone."""

    def __init__(self, ids):
        super().__init__(ids, ids)

    def __iter__(self):
        return (ids for ids, _ in super().__iter__())


def data(job, rank=0, num_ranks=1):
    """The rank's part of every global batch."""
    accumulate = job.trainer.get("accumulate_grad_batches", 1)
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 40, (job.steps * accumulate, job.batch, LENGTH), generator=generator)
    return Ids(ids[:, rank * job.batch // num_ranks : (rank + 1) * job.batch // num_ranks])


def of_all_ranks(job, num_ranks):
    """The parts of every global batch that ranks have, one after the other."""
    by_rank = [data(job, rank, num_ranks).x for rank in range(num_ranks)]
    return Ids(torch.stack(list(chain(*zip(*by_rank, strict=True)))))


def train(job, family, module_class=Causal, ckpt_path=None):
    """On every rank: the module afterwards, in parts that can be sent."""
    trainer, module = our_trainer(job), module_class(job, family)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=ckpt_path)
    assert module.model.get_experts_implementation()[""] == module.implementation
    return {
        "losses": module.losses,
        "gradients": module.gradients,
        "weights": module.state_dict(),
        "seen": module.seen,
    }


def train_alone(job, family, module_class=Causal, by_parts_of=1):
    """In this process, with no strategy; with ``by_parts_of`` ranks, gradients of their parts add up."""
    accumulate = by_parts_of * job.trainer.get("accumulate_grad_batches", 1)
    trainer = make_trainer(job, accumulate_grad_batches=accumulate)
    module = module_class(job, family)
    trainer.fit(module, of_all_ranks(job, by_parts_of))
    return module


def available(*families):
    return [
        pytest.param(family, marks=pytest.mark.skipif(config_of(family) is None, reason="not in this transformers"))
        for family in families
    ]


class Pretrained(Causal):
    """As ``from_pretrained`` returns models: in eval mode, where Lightning leaves them."""

    def __init__(self, job, family):
        super().__init__(job, family)
        self.model.eval()


def compare(num_ranks, job, family, module_class=Causal, by_parts=False):
    """Ranks with one process; the gradients of every step before they are clipped, and the weights at the end."""
    alone = train_alone(job, family, module_class, by_parts_of=num_ranks if by_parts else 1)
    results = run_ranks(num_ranks, train, job, family, module_class)
    for result in results:
        assert len(result["gradients"]) == len(alone.gradients)
        for got, want in zip(result["gradients"], alone.gradients, strict=True):
            assert largest_error(got, want) < 1e-9
        assert largest_error(result["weights"], alone.state_dict()) < 1e-9
        assert all(torch.equal(result["weights"][key], weight) for key, weight in results[0]["weights"].items())
    got = torch.tensor([result["losses"] for result in results], dtype=torch.float64).mean(dim=0)
    want = torch.tensor(alone.losses, dtype=torch.float64)
    if by_parts:
        want = want.view(-1, num_ranks).mean(dim=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    "family", available("mixtral", "olmoe", "qwen3_moe", "qwen3_5_moe", "granitemoe", "gpt_oss", *PARTLY_IN_FP32)
)
def test_ranks_equal_one_process(family, num_ranks):
    compare(num_ranks, job_of(), family, by_parts=family in PARTLY_IN_FP32)


@pytest.mark.parametrize(("family", "num_ranks"), [("qwen3_moe", 1), ("qwen3_moe", 2), ("gpt_oss", 2)])
def test_models_that_stay_in_eval_mode(family, num_ranks):
    compare(num_ranks, job_of(), family, Pretrained)


class WithAuxiliaryLoss(Causal):
    """It is not linear in the batch: of ranks it is the mean of theirs, as everywhere in data parallelism."""

    def loss(self, ids):
        auxiliary = self.model(input_ids=ids, use_cache=False).aux_loss
        return super().loss(ids) + 0.1 * auxiliary


class Checkpointed(Causal):
    """Activations are computed again in the backward, and tokens travel again."""

    def __init__(self, job, family):
        super().__init__(job, family)
        getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)()


class WithChoicesOfNoExpert(Causal):
    """Every third token has one choice less."""

    def __init__(self, job, family):
        super().__init__(job, family)
        for name, router in self.model.named_modules():
            if name.endswith((".mlp.gate", ".mixer.gate")):
                router.register_forward_hook(self.chosen)

    def chosen(self, router, args, output):
        logits, weights, index = output
        index = index.clone()
        index[::3, 1] = router.weight.shape[0]
        return logits, weights, index


class Compiled(Causal):
    """Compiled, and called with our experts, before anybody attaches a layer."""

    def __init__(self, job, family):
        super().__init__(job, family)
        self.implementation = NAME
        self.model.set_experts_implementation(NAME)
        self.model.compile(backend="aot_eager")
        self.loss(data(job).x[0]).backward()
        self.zero_grad()


VARIANTS = {
    "clip_and_accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "clip_value": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "bound": {"strategy": {"optimizer_state": "bound"}},
    "offload": {"strategy": {"offload_optimizer": True}},
    "exact_with_copies": {"strategy": {"split": "exact", "transient_copies": 2}, "slots": 3},
    "groups_of_one": {"strategy": {"expert_parallel_size": 1}},
    "balanced": {"policy": "balanced"},
    "fsdp2": {"strategy": {"dense": "fsdp2"}, "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    compare(2, job_of(**VARIANTS[variant]), "qwen3_moe")


# Weights that are bf16 in the end are rounded more than they moved.
@pytest.mark.parametrize(
    ("precision", "of_weights", "of_moves"),
    [("32-true", 1e-6, 1e-4), ("bf16-mixed", 1e-2, 0.3), ("bf16-true", 1e-2, float("inf"))],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_precisions(family, precision, of_weights, of_moves):
    """Adam turns a rounding of a tiny gradient into a full step; SGD keeps roundings their size."""
    job = job_of(precision=precision, optimizer=lambda module: torch.optim.SGD(module.parameters(), 0.05))
    alone = train_alone(dataclasses.replace(job, precision="32-true"), family).state_dict()
    start = Causal(job, family).state_dict()
    for result in run_ranks(2, train, job, family):
        weights = {name: tensor.float() for name, tensor in result["weights"].items()}
        assert largest_error(weights, alone) < of_weights
        experts = [name for name in weights if ".experts." in name]
        moved = {name: weights[name] - start[name] for name in experts}
        assert largest_error(moved, {name: alone[name] - start[name] for name in experts}) < of_moves


def test_groups_of_ranks():
    compare(4, job_of(strategy={"expert_parallel_size": 2}), "qwen3_moe", WithAuxiliaryLoss, by_parts=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_models_auxiliary_loss(family):
    compare(2, job_of(), family, WithAuxiliaryLoss, by_parts=True)


def test_activation_checkpointing():
    compare(2, job_of(), "qwen3_moe", Checkpointed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiled(num_ranks):
    compare(num_ranks, job_of(), "mixtral", Compiled)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_choices_of_no_expert(num_ranks):
    compare(num_ranks, job_of(), "qwen3_moe", WithChoicesOfNoExpert, by_parts=True)


def train_by_plan(*args):
    setup._device_exchanges = lambda transport, tokens, control, bound: (NcclRows(tokens, bound), None)
    return train(*args)


@pytest.mark.parametrize("module_class", [Causal, Checkpointed, WithChoicesOfNoExpert])
@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h"])
def test_planned_as_on_a_device(family, module_class):
    """Rows are added up in fp32 on that way."""
    alone = train_alone(job_of(), family, module_class, by_parts_of=2)
    for result in run_ranks(2, train_by_plan, job_of(), family, module_class):
        for got, want in zip(result["gradients"], alone.gradients, strict=True):
            assert largest_error(got, want) < 1e-4
        assert largest_error(result["weights"], alone.state_dict()) < 1e-5


# -- loads and placements ----------------------------------------------------------------------------------------------


class Counted(Causal):
    """Counts the choices that reach experts, by layer."""

    def on_train_start(self):
        self.counts = [{}]
        for name, part in self.model.named_modules():
            if name.endswith(".experts"):
                part.register_forward_pre_hook(lambda part, args, name=name: self.count(name, part, args[1]))

    def count(self, name, experts, index):
        counted = torch.bincount(index.flatten(), minlength=experts.num_experts)
        self.counts[-1][f"model.{name}"] = self.counts[-1].get(f"model.{name}", 0) + counted

    def on_train_batch_end(self, *args):
        self.counts.append({})


def train_with_steps(job, family, module_class=Causal):
    trainer, module = our_trainer(job), module_class(job, family)
    steps = []
    module.on_train_start = lambda: only_rebalancer(trainer.callbacks).engine.observers.append(steps.append)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return steps, metrics


def test_loads_are_the_models_choices_and_placements_follow():
    job = job_of(policy="proportional")
    alone = train_alone(job, "deepseek_v3", Counted)
    for steps, metrics in run_ranks(2, train_with_steps, job, "deepseek_v3"):
        assert len(steps) == job.steps
        for step, counts in zip(steps, alone.counts, strict=False):
            assert [layer.name for layer in step.layers] == list(counts)
            for layer in step.layers:
                assert layer.loads.tolist() == counts[layer.name].tolist()
                assert layer.counts.shape == (2, 8)
                assert layer.top_k == 3
                assert layer.num_tokens == BATCH * LENGTH
                most = layer.next_placement.replicas.argmax()
                assert layer.next_placement.replicas[most] > 1
                assert layer.loads[most] >= sorted(layer.loads)[-3]
        assert metrics["moe/token_survival"] == 1
        assert "moe/aux_loss" not in metrics  # it is the model's, and not known here


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_choices_of_no_expert_are_no_load(num_ranks):
    for steps, _ in run_ranks(num_ranks, train_with_steps, job_of(), "qwen3_moe", WithChoicesOfNoExpert):
        assert len(steps) == 4
        for layer in chain(*(step.layers for step in steps)):
            assert layer.num_routed == layer.num_processed == BATCH * LENGTH * 2 - BATCH * LENGTH // 3


class Mixed(Causal):
    """A layer of ours behind a model of theirs."""

    def __init__(self, job, family):
        super().__init__(job, family)
        torch.manual_seed(2)
        self.moe = MoE(40, 5, 4, top_k=2, aux_loss_coef=0.1).double()

    def loss(self, ids):
        logits = self.model(input_ids=ids, use_cache=False).logits
        logits = logits + self.moe(logits)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_layers_of_both_kinds():
    compare(2, job_of(), "qwen3_moe", Mixed)
    for steps, metrics in run_ranks(2, train_with_steps, job_of(), "qwen3_moe", Mixed):
        names = [layer.name for layer in steps[0].layers]
        assert names == ["model.model.layers.0.mlp.experts", "model.model.layers.1.mlp.experts", "moe"]
        assert metrics["moe/aux_loss"] == pytest.approx(steps[-1].layers[-1].aux_loss)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_resumed_from_a_checkpoint(tmp_path, kind):
    path = str(tmp_path / "half.ckpt")
    job = job_of(strategy={"checkpoint": kind})
    whole = run_ranks(2, train, dataclasses.replace(job, callbacks=lambda: [SaveAt(path, 2)]), "qwen3_moe")[0]
    for resumed in run_ranks(2, train, job, "qwen3_moe", Causal, path):
        assert len(resumed["losses"]) == 2
        assert all(torch.equal(resumed["weights"][key], weight) for key, weight in whole["weights"].items())
    other = run_ranks(1, train, job, "qwen3_moe", Causal, path)[0]
    assert largest_error(other["weights"], whole["weights"]) < 1e-9


def test_the_file_has_the_models_names_and_whole_weights(tmp_path):
    path = tmp_path / "half.ckpt"
    job = job_of(callbacks=lambda: [SaveAt(path, 2)])
    run_ranks(2, train, job, "qwen3_moe")
    state = torch.load(path, weights_only=True)["state_dict"]
    expected = train_alone(dataclasses.replace(job, steps=2, callbacks=list, trainer={"max_steps": 2}), "qwen3_moe")
    assert largest_error(state, expected.state_dict()) < 1e-9


def save_after_fit(job, folder, family):
    trainer, module = our_trainer(job), Causal(job, family)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    if trainer.is_global_zero:
        module.model.save_pretrained(folder)
    return module.state_dict()


@pytest.mark.parametrize(("family", "num_ranks"), [("qwen3_moe", 1), ("qwen3_moe", 2), ("gpt_oss", 2)])
def test_save_pretrained_after_fit(tmp_path, family, num_ranks):
    weights = run_ranks(num_ranks, save_after_fit, job_of(), tmp_path, family)[0]
    assert_saved(tmp_path, weights)
    assert NAME not in (tmp_path / "config.json").read_text()


def assert_saved(folder, weights):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()
    assert {f"model.{name}" for name in loaded} == set(weights)
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in loaded.items())


class SavesInFit(Causal):
    """After the last step; of whole tensors, or of what it has."""

    folder, whole = "", False

    def on_train_end(self):
        state = {name: full(tensor) for name, tensor in self.model.state_dict().items()} if self.whole else None
        self.model.save_pretrained(self.folder, state_dict=state)


def save_in_fit(job, folder, whole):
    trainer, module = our_trainer(job), SavesInFit(job, "qwen3_moe")
    module.folder, module.whole = f"{folder}/{dist.get_rank()}", whole
    try:
        trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    except RuntimeError as error:
        return str(error)
    return module.state_dict()


def test_save_pretrained_in_fit_on_one_rank(tmp_path):
    assert_saved(tmp_path / "0", run_ranks(1, save_in_fit, job_of(), tmp_path, False)[0])


def test_save_pretrained_in_fit_of_whole_tensors(tmp_path):
    assert_saved(tmp_path / "0", run_ranks(2, save_in_fit, job_of(), tmp_path, True)[0])


def test_save_pretrained_in_fit_of_parts_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"spread over 2 ranks and cannot be written from one of them\. Save with"):
        run_ranks(2, save_in_fit_loudly, job_of(), tmp_path, timeout_s=30)
    assert not list(tmp_path.glob("*/*.safetensors"))


def save_in_fit_loudly(job, folder):
    result = save_in_fit(job, folder, whole=False)
    if isinstance(result, str):
        raise RuntimeError(result)


# -- validation --------------------------------------------------------------------------------------------------------


def validate(job, family, counts):
    """Ranks with different numbers of batches: each sees its own."""
    trainer, module = our_trainer(job, num_sanity_val_steps=0), Causal(job, family)
    rank = dist.get_rank()
    trainer.fit(module, data(job, rank, 2), DataLoader(list(data(job, rank, 2))[: counts[rank]], batch_size=None))
    return module.seen, trainer.callback_metrics["val"].item(), module.state_dict()


@pytest.mark.parametrize(
    ("family", "counts"),
    [("qwen3_moe", (2, 2)), ("qwen3_moe", (3, 1)), ("gpt_oss", (3, 1))],
    ids=["even", "uneven", "uneven_unfused"],
)
def test_validation(family, counts):
    job = job_of(steps=2, trainer={"limit_val_batches": 4})
    job = dataclasses.replace(job, steps=4, trainer={"max_steps": 2, "val_check_interval": 2})
    alone = train_alone(dataclasses.replace(job, trainer={"max_steps": 2}), family).eval()
    results = run_ranks(2, validate, job, family, counts)
    for rank, (seen, _, weights) in enumerate(results):
        with torch.no_grad():
            wanted = [alone.loss(ids).item() for ids in list(data(job, rank, 2))[: counts[rank]]]
        torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=0)
        assert largest_error(weights, alone.state_dict()) < 1e-9
    assert results[0][1] == results[1][1]


END = 5  # a token


class Generates(Pretrained):
    """Other ranks' texts are longer."""

    def validation_step(self, batch, batch_idx):
        longest = 3 + 2 * dist.get_rank()
        greedily = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
        self.seen.append(self.model.generate(batch[:, :4], synced_gpus=True, **greedily)[:, 4:])


def generate(job):
    trainer, module = our_trainer(job, num_sanity_val_steps=0), Generates(job, "qwen3_moe")
    mine = data(job, dist.get_rank(), 2)
    trainer.fit(module, mine, DataLoader(list(mine)[:2], batch_size=None))
    return module.seen, module.state_dict()


def test_generation_in_validation():
    job = job_of(steps=2, trainer={"val_check_interval": 2})
    results = run_ranks(2, generate, job)
    alone = Causal(job, "qwen3_moe").eval()
    for rank, (seen, weights) in enumerate(results):
        alone.load_state_dict(weights)
        for ids, got in zip(data(job, rank, 2), seen, strict=True):
            wanted, longest = ids[:, :4], 3 + 2 * rank
            for _ in range(longest):
                likeliest = alone.model(input_ids=wanted, use_cache=False).logits[:, -1].argmax(dim=-1)
                wanted = torch.cat([wanted, likeliest[:, None]], dim=1)
            new = wanted[:, 4:]
            ends = (new == END).int()
            assert torch.equal(got, new.masked_fill(ends.cumsum(dim=1) - ends > 0, 0))


# -- what models are told, and what is refused -------------------------------------------------------------------------


class Asks(Causal):
    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(self.model.get_experts_implementation()[""])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_models_are_told_in_fit_only(num_ranks):
    for result in run_ranks(num_ranks, train, job_of(steps=2), "mixtral", Asks):
        assert result["seen"] == [NAME, NAME]


class Fails(Causal):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("on purpose")


def test_an_exception_gives_the_implementation_back():
    job = job_of()
    trainer, module = our_trainer_alone(job), Fails(job, "mixtral")
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(module, data(job))
    assert module.model.get_experts_implementation()[""] == "eager"
    assert not any(layer.is_attached for layer in find_layers(module).values())


def our_trainer_alone(job, **options):
    return make_trainer(job, "swiftmoe", **options)


def refused(job, family, module_class=Causal):
    try:
        train(job, family, module_class)
    except ValueError as error:
        return str(error)


class Alone(Causal):
    """An experts module that is in no model."""

    def __init__(self, job, family):
        super().__init__(job, family)
        self.experts = self.model.model.layers[0].mlp.experts
        self.model = nn.Linear(3, 3)


def test_experts_without_a_model_are_refused_on_several_ranks():
    for message in run_ranks(2, refused, job_of(), "qwen3_moe", Alone):
        assert message.startswith("experts: several ranks cannot share the experts of Qwen3MoeExperts: got a module")


def listen():
    """What Lightning says from now on, line by line, as it comes."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = rank_zero.log  # whichever of Lightning's modules set it last
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return said


def fit_and_listen(job, family, on):
    """What was said about auxiliary losses."""
    said = listen()
    trainer, module = our_trainer(job), Causal(job, family)
    if hasattr(module.model.config, "output_router_logits"):
        module.model.config.output_router_logits = on
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return [line for line in said if "auxiliary loss" in line]


@pytest.mark.parametrize(("family", "on"), [("mixtral", False), ("mixtral", True), ("deepseek_v3", False)])
def test_a_silent_auxiliary_loss_is_named_once(family, on):
    first, second = run_ranks(2, fit_and_listen, job_of(steps=1), family, on)
    assert not second
    assert len(first) == (family == "mixtral" and not on)
    for line in first:
        assert "model.config.output_router_logits = True" in line
        assert "\n" not in line


# -- one process that acts as several ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "module_class"),
    [("qwen3_moe", Causal), ("qwen3_moe", WithChoicesOfNoExpert), ("gpt_oss", Causal)],
)
def test_a_virtual_cluster_has_the_loads_of_ranks(family, module_class):
    job = job_of(policy="balanced")
    alone = train_alone(job, family, module_class)
    cluster = VirtualCluster(2, policy="balanced")
    steps = []
    trainer, module = make_trainer(job, callbacks=[cluster]), module_class(job, family)
    module.on_train_start = lambda: cluster.engine.observers.append(steps.append)
    trainer.fit(module, data(job))
    assert largest_error(module.state_dict(), alone.state_dict()) < 1e-9
    assert module.model.get_experts_implementation()[""] == "eager"
    if module_class is Causal:
        ((real, _), _) = run_ranks(2, train_with_steps, job, family)
        for step, other in zip(steps, real, strict=True):
            for layer, same in zip(step.layers, other.layers, strict=True):
                assert (layer.counts == same.counts).all()
                assert (layer.next_placement.table == same.next_placement.table).all()
    assert steps
