"""Dense Parameters sharded by FSDP2 beside decoupled experts: the weights, checkpoints and modules of one process."""

import copy
import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_swiftmoe import SwiftMoEStrategy, WeightEMA
from lightning_swiftmoe.parallel.expert_tensor import local_part
from tests.gpu.cases import Checkpointed
from tests.jobs import Job, Net, adamw, data, largest_error, our_trainer, sgd, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

FSDP = {"dense": "fsdp2"}
JOB = Job(slots=3, strategy=FSDP)


class Tied(Net):
    """Tied layers, a buffer, a frozen bias, and weights that are used outside of their module's forward."""

    def __init__(self, job):
        super().__init__(job)
        self.again = nn.Linear(job.width, job.width, bias=False)
        self.once_more = nn.Linear(job.width, job.width, bias=False)
        self.once_more.weight = self.again.weight
        self.register_buffer("shift", torch.randn(job.width))
        self.inp.bias.requires_grad_(False)
        self.another_name = self.moes

    def forward(self, x):
        hidden = self.once_more(self.again(self.inp(x + self.shift)))
        for moe in self.moes:
            hidden = hidden + moe(torch.tanh(hidden))
        return nn.functional.linear(hidden, self.out.weight, self.out.bias)

    def loss(self, batch):
        return super().loss(batch) + 0.01 * self.again.weight.square().sum()


class Manual(Net):
    """Two optimizers by hand, clipped together."""

    def __init__(self, job):
        super().__init__(job)
        self.automatic_optimization = False

    def configure_optimizers(self):
        moes, rest = list(self.moes.parameters()), [*self.inp.parameters(), *self.out.parameters()]
        return [torch.optim.SGD(moes, 0.1), torch.optim.AdamW(rest, 0.01)]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


class ManualOften(Manual):
    """Several backwards and steps in one training_step, and looks at the weights between."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.manual_backward(self.loss(batch))
            with torch.no_grad():
                self(batch[0])
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            optimizer.step()
            self.zero_grad()


class CompiledBlocks(Net):
    """Every block is compiled, as FSDP2 wants it."""

    def __init__(self, job):
        super().__init__(job)
        for moe in self.moes:
            moe.compile(backend="aot_eager")


def compare(num_ranks, job, bound=1e-9, run=train):
    expected = train_alone(dataclasses.replace(job, strategy={}))
    results = run_ranks(num_ranks, run, job)
    for result in results:
        assert all(not isinstance(value, DTensor) for value in result.values())
        assert largest_error(result, expected) < bound
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_ranks_equal_one_process(num_ranks, optimizer):
    compare(num_ranks, dataclasses.replace(JOB, optimizer=optimizer, slots=-(-5 // num_ranks) + 1))


VARIANTS = {
    "tied": {"module": Tied},
    "manual": {"module": Manual},
    "manual_often": {"module": ManualOften},
    "checkpointed": {"module": Checkpointed},
    "compiled": {"module": CompiledBlocks},
    "clip": {"trainer": {"gradient_clip_val": 0.05}},
    "clip_value": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "groups": {"strategy": {**FSDP, "expert_parallel_size": 1}, "slots": 5, "trainer": {"gradient_clip_val": 0.05}},
    "bound": {"strategy": {**FSDP, "optimizer_state": "bound"}},
    "signs": {"optimizer": lambda module: Signs(module.parameters())},
    "offload": {"strategy": {**FSDP, "offload_optimizer": True}},
    "adagrad": {
        "optimizer": lambda module: torch.optim.Adagrad(module.parameters(), 0.05, initial_accumulator_value=0.1)
    },
}


class Signs(torch.optim.Optimizer):
    """Nobody's: every weight goes one way or the other."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * torch.tanh(10 * param.grad))
        return loss


ALSO = ("compiled", "clip_value", "adagrad", "offload")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.exhaustive) if v in ALSO else v for v in VARIANTS]
)
def test_variants(variant):
    compare(3, dataclasses.replace(JOB, **VARIANTS[variant]))


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 2e-5), ("bf16-mixed", 2e-2), ("bf16-true", 6e-2)])
def test_other_precisions(precision, bound):
    trainer = {"gradient_clip_val": 0.05}
    compare(2, dataclasses.replace(JOB, precision=precision, optimizer=sgd, trainer=trainer), bound)


class Looks(pl.Callback):
    """Between steps: what a rank holds, a forward that nothing follows, and a validation."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 0:
            with torch.no_grad():
                pl_module(batch[0])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        dense = [param for name, param in pl_module.named_parameters() if "experts" not in name]
        with torch.no_grad():
            norms = sum(float(param.norm()) for param in dense)
            self.seen.append((norms, sum(local_part(param).numel() for param in dense)))


class FromAnySeed(Net):
    """Ranks begin with other weights and buffers."""

    def __init__(self, job):
        super().__init__(job)
        self.register_buffer("shift", torch.zeros(job.width))
        if dist.is_initialized() and dist.get_rank():
            with torch.no_grad():
                for tensor in (*self.parameters(), self.shift):
                    tensor.add_(1)

    def forward(self, x):
        return super().forward(x + self.shift)


def fit_and_look(job):
    looks = Looks()
    job = dataclasses.replace(job, callbacks=lambda: [looks], trainer={"val_check_interval": 2})
    module, trainer = job.module(job), our_trainer(job)
    before = described(module)
    assert before[-1] == []
    part = data(job, dist.get_rank(), dist.get_world_size())
    trainer.fit(module, part, part)
    assert described(module) == before
    (validated,) = trainer.validate(module, part, verbose=False)
    trainer = our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), part)
    assert described(module) == before
    return looks.seen, validated, module.state_dict()


def described(module):
    """Classes, Parameters, and all that FSDP2 may have left."""
    classes = [(name, type(part)) for name, part in module.named_modules()]
    params = [(name, id(param), type(param), param.requires_grad) for name, param in module.named_parameters()]
    attributes = [
        repr(pair) for part in module.modules() for pair in vars(part).items() if pair[0] not in ("_modules", "job")
    ]
    return classes, params, [text for text in attributes if "fsdp" in text.lower() or "composable" in text]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_holds_its_part_and_the_module_comes_back(num_ranks):
    job = dataclasses.replace(JOB, module=FromAnySeed, optimizer=sgd)
    ((_, metrics, one),) = run_ranks(1, fit_and_look, dataclasses.replace(job, slots=6, strategy={}))
    num_dense = sum(value.numel() for name, value in one.items() if "experts" not in name and name != "shift")
    results = run_ranks(num_ranks, fit_and_look, job)
    held = [seen[-1][1] for seen, *_ in results]
    assert sum(held) == num_dense
    assert max(held) < 0.75 * num_dense
    for seen, validated, weights in results:
        assert [norm for norm, _ in seen] == [norm for norm, _ in results[0][0]]
        assert validated == pytest.approx(metrics, rel=1e-12)
        assert largest_error(weights, one) < 1e-9


class Normalized(Net):
    """Statistics of batches, of rank 0's as DDP has it."""

    def __init__(self, job):
        super().__init__(job)
        self.norm = nn.BatchNorm1d(job.width)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_buffers_are_rank_zeros_as_under_ddp():
    job = dataclasses.replace(JOB, module=Normalized)
    ddp = run_ranks(2, train, dataclasses.replace(job, strategy={}))
    sharded = run_ranks(2, train, job)
    for got, want in zip(sharded, ddp, strict=True):
        assert got.pop("norm.num_batches_tracked") == want.pop("norm.num_batches_tracked") == job.steps
        assert largest_error(got, want) < 1e-12


def train_and_save(job, path, resume=None, early=False):
    """With ``early`` the optimizer holds Parameters of before the fit."""
    module, trainer = job.module(job), our_trainer(job)
    if early:
        optimizer = job.optimizer(module.double())
        module.configure_optimizers = lambda: optimizer
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()), ckpt_path=resume)
    trainer.save_checkpoint(path)
    return module.state_dict()


class Saves(pl.Callback):
    """In the middle, on all ranks."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_go_on_with_other_ranks_and_other_dense(tmp_path, kind):
    half = tmp_path / "half"
    job = dataclasses.replace(JOB, module=Tied, strategy={**FSDP, "checkpoint": kind}, steps=6)
    saving = dataclasses.replace(job, callbacks=lambda: [Saves(half)])
    whole = run_ranks(2, train_and_save, saving, tmp_path / "whole", None, True)
    alone = train_alone(dataclasses.replace(job, strategy={}))
    assert largest_error(whole[0], alone) < 1e-9
    again = run_ranks(2, train_and_save, job, tmp_path / "again", half)
    assert all(torch.equal(again[0][key], value) for key, value in whole[0].items())
    for num_ranks, dense in ((3, "fsdp2"), (2, "ddp"), (1, "fsdp2")):
        other = dataclasses.replace(job, slots=6, strategy={"checkpoint": kind, "dense": dense})
        for result in run_ranks(num_ranks, train_and_save, other, tmp_path / "other", half):
            assert largest_error(result, alone) < 1e-9
    ddp = dataclasses.replace(job, strategy={"checkpoint": kind}, callbacks=lambda: [Saves(half)])
    run_ranks(2, train_and_save, ddp, tmp_path / "ddp")
    for result in run_ranks(3, train_and_save, job, tmp_path / "back", half):
        assert largest_error(result, alone) < 1e-9


def test_the_file_is_that_of_replicated_weights(tmp_path):
    files = []
    for dense in ("fsdp2", "ddp"):
        path = tmp_path / dense
        job = dataclasses.replace(JOB, strategy={"dense": dense}, callbacks=lambda path=path: [Saves(path)])
        run_ranks(2, train, job)
        files.append(torch.load(path, weights_only=True))
    sharded, replicated = (file["state_dict"] for file in files)
    assert {name: value.shape for name, value in sharded.items()} == {k: v.shape for k, v in replicated.items()}
    assert largest_error(sharded, replicated) < 1e-12
    states, others = (file["optimizer_states"][0] for file in files)
    assert states["param_groups"] == others["param_groups"]
    for index, state in others["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(states["state"][index][name], value, rtol=1e-9, atol=1e-12)


def averages(job):
    average = WeightEMA(decay=0.5)
    job = dataclasses.replace(job, callbacks=lambda: [average], trainer={"val_check_interval": 2})
    part = data(job, dist.get_rank(), dist.get_world_size())
    module = job.module(job)
    our_trainer(job).fit(module, part, part)
    averaged = copy.deepcopy(module)
    average.apply_to(averaged)
    return averaged.state_dict(), module.state_dict()


def test_averages_of_weights():
    ((averaged, weights),) = run_ranks(1, averages, dataclasses.replace(JOB, slots=6))
    for got, trained in run_ranks(2, averages, JOB):
        assert largest_error(got, averaged) < 1e-9
        assert largest_error(trained, weights) < 1e-9


class OnMeta(Net):
    """Nothing has memory."""

    def __init__(self, job):
        with torch.device("meta"):
            super().__init__(job)


def fit_from_meta(job):
    torch.manual_seed(7)
    module, trainer = job.module(job), our_trainer(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    trainer.strategy.gather_experts()
    return module.state_dict()


def test_a_start_on_the_meta_device():
    job = dataclasses.replace(JOB, module=OnMeta)
    (one,) = run_ranks(1, fit_from_meta, dataclasses.replace(job, slots=6))
    for weights in run_ranks(3, fit_from_meta, job):
        assert largest_error(weights, one) < 1e-9


class Scalar(Net):
    def __init__(self, job):
        super().__init__(job)
        self.factor = nn.Parameter(torch.ones(()))


class SharedByBlocks(Net):
    def __init__(self, job):
        super().__init__(job)
        self.moes[1].router.weight = self.moes[0].router.weight


class Unfreezes(Net):
    def __init__(self, job):
        super().__init__(job)
        self.inp.bias.requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.inp.bias.requires_grad_(True)


class ManualWithoutBlocks(Manual):
    """The loss is of nothing that FSDP2 has hooks on."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.out(self.inp(batch[0])).sum())


class ManualByParts(Manual):
    """Another forward behind a backward, by parts of the module."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.out(self.inp(batch[0]))


class AloneInAHook(Net):
    """A dense layer outside of any forward."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.inp(batch[0])


class TensorParallel(Net):
    """Cut by the user, over all ranks."""

    def configure_model(self):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(self.inp, mesh, ColwiseParallel())


class Normed(torch.optim.SGD):
    """Every step is as long as any other."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.div_(param.grad.norm())
        return super().step(closure)


def normed(module):
    return [Normed(module.out.parameters(), 0.1), torch.optim.SGD(module.moes.parameters(), 0.1)]


def error_of(job):
    module = job.module(job)
    if job.optimizer is normed:
        module.automatic_optimization = False
    part = data(job, dist.get_rank(), dist.get_world_size())
    val = data(dataclasses.replace(job, steps=2 - dist.get_rank()), dist.get_rank(), dist.get_world_size())
    with pytest.raises((ValueError, RuntimeError)) as caught:
        our_trainer(job).fit(module, part, val)
    return str(caught.value)


WHOLE_ONLY = "that dense='fsdp2' has cut, which is whole only while its block, or the module, runs"
REFUSED = {
    "tensor_parallel": ({"module": TensorParallel}, "inp.weight is spread over DeviceMesh"),
    "tensor_parallel_ddp": ({"module": TensorParallel, "strategy": {}}, "inp.weight is spread over DeviceMesh"),
    "scalar": ({"module": Scalar}, "factor has none: give it shape [1]"),
    "shared": (
        {"module": SharedByBlocks},
        "are one Parameter, and dense='fsdp2' gathers moes.0 and moes.1 apart",
    ),
    "unseen": ({"module": ManualWithoutBlocks}, "a backward brought no gradients to what dense='fsdp2' has cut"),
    "by_parts": ({"module": ManualByParts}, WHOLE_ONLY),
    "in_a_hook": ({"module": AloneInAHook}, WHOLE_ONLY),
    "unfreezes": ({"module": Unfreezes}, "inp.bias.requires_grad became True in fit"),
    "normed": ({"optimizer": normed}, "dense='fsdp2' gives Normed parts of dense Parameters; use dense='ddp'"),
    "uneven": ({"trainer": {"num_sanity_val_steps": 0}}, "rank(s) [1] have no more validation batches"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_sharded_is_refused(what):
    change, message = REFUSED[what]
    change = {"trainer": {"limit_val_batches": 0}, **change}
    for text in run_ranks(2, error_of, dataclasses.replace(JOB, **change)):
        assert message in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "fsdp"}, "fsdp2"),
        ({"dense": "fsdp2", "redundancy": 2}, "redundancy=2 needs dense='ddp'"),
        ({"dense": "fsdp2", "static_graph": True}, "static_graph is for DDP"),
        ({"dense": "fsdp2", "ddp_comm_hook": print}, "ddp_comm_hook is for DDP"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SwiftMoEStrategy(**options)
