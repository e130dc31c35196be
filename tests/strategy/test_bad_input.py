"""A mistake gives one clear error, and no rank is left waiting."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_swiftmoe import ExpertRebalancer, MoE, SwiftMoEStrategy
from lightning_swiftmoe._compat import refuse_other_namespace
from lightning_swiftmoe.placement import RandomPolicy
from lightning_swiftmoe.virtual import VirtualCluster
from tests.jobs import Job, Net, data, largest_error, make_trainer, our_trainer, sgd
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_k": 5}, "top_k must be 1 .. num_experts = 4, got 5"),
        ({"top_k": 0}, "top_k must be"),
        ({"activation": "tanh"}, "activation must be one of .*gelu.*, got 'tanh'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be None .* above zero, got 0.0"),
        ({"score": "max"}, "score must be one of softmax, sigmoid, got 'max'; did you mean 'softmax'"),
        ({"aux_loss_coef": -1}, "aux_loss_coef must be a number, zero or more, got -1"),
        ({"capacity_factor": "1.0"}, "capacity_factor must be None .* above zero, got '1.0': write 1.0 without quotes"),
        ({"capacity_factor": float("inf")}, "capacity_factor must be None .dropless. or a number above zero, got inf"),
        ({"aux_loss_coef": None}, "aux_loss_coef must be a number, zero or more, got None"),
        ({"z_loss_coef": "0"}, "z_loss_coef must be a number, zero or more, got '0'"),
        ({"bias_update_rate": True}, "bias_update_rate must be a number, zero or more, got True"),
        ({"shared_ffn_size": 1.5}, "shared_ffn_size must be an integer, zero or more, got 1.5"),
        ({"top_k": "2"}, "top_k must be 1 .. num_experts = 4, got '2': write 2 without quotes"),
        ({"top_k": True}, "top_k must be 1 .. num_experts = 4, got True"),
        ({"activation": "Gelu"}, "activation must be .*, got 'Gelu'; did you mean 'gelu'"),
        ({"activation": nn.GELU()}, "activation must be one of .*, got GELU"),
        ({"normalize_topk": "yes"}, "normalize_topk must be True or False, got 'yes'"),
    ],
)
def test_layer_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 16, 4, **kwargs)


@pytest.mark.parametrize("sizes", [(8.0, 16, 4), (8, "16", 4), (8, 16, None), (8, 16, True), (8, 0, 4)])
def test_layer_sizes(sizes):
    with pytest.raises(ValueError, match="must be a positive integer, got"):
        MoE(*sizes)


def test_numbers_of_numpy_are_numbers():
    MoE(8, np.int64(16), 4, capacity_factor=np.float32(1.5), top_k=np.int64(2))


def test_layer_input_of_another_width():
    with pytest.raises(ValueError, match="the last dim of x must be hidden_size = 8, got 9"):
        MoE(8, 16, 4)(torch.randn(2, 9))


@pytest.mark.parametrize("slots", [0, -1, 1.5, "many", True])
def test_slots_argument(slots):
    with pytest.raises(ValueError, match='slots_per_rank must be "auto" or a positive integer'):
        SwiftMoEStrategy(slots_per_rank=slots)


def test_names_of_arguments_also_where_ddp_would_not_look_at_them():
    with pytest.raises(TypeError, match="unexpected keyword argument 'slot_per_rank'; did you mean 'slots_per_rank'"):
        SwiftMoEStrategy(slot_per_rank=4)
    with pytest.raises(TypeError, match=r"'policy': it belongs to a callback, ExpertRebalancer\(policy='static'\)"):
        SwiftMoEStrategy(policy="static")
    with pytest.raises(TypeError, match="'slots'; did you mean 'slots_per_rank'"):
        SwiftMoEStrategy(slots=4)
    SwiftMoEStrategy(find_unused_parameters=True, start_method="fork")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"offload_optimizer": "yes"}, "offload_optimizer must be True or False, got 'yes'"),
        ({"timeout": "10"}, "timeout must be a timedelta, or seconds above zero, got '10': write 10 without quotes"),
        ({"timeout": 0}, "timeout must be a timedelta, or seconds above zero, got 0"),
        ({"timeout": None}, "timeout must be a timedelta, or seconds above zero, got None"),
        ({"start_method": "threads"}, "start_method must be one of popen, spawn, fork, forkserver, got 'threads'"),
        ({"optimizer_state": "decopled"}, "got 'decopled'; did you mean 'decoupled'"),
        ({"transport": "ncl"}, "got 'ncl'; did you mean 'nccl'"),
        ({"capacity_scope": None}, "capacity_scope must be one of cluster, rank, pooled, got None"),
        ({"split": "equal"}, "split must be one of even, exact, got 'equal'"),
        ({"transient_copies": 1, "split": "even"}, "transient_copies=1 needs split='exact', got 'even'"),
        ({"transient_copies": "auto", "split": "even"}, "transient_copies='auto' needs split='exact', got 'even'"),
        ({"transient_copies": "some"}, "transient_copies must be 'auto' or an integer, 0 or more, got 'some'"),
        ({"expert_parallel_size": 2.0}, "expert_parallel_size must be None .* or a positive integer, got 2.0"),
    ],
)
def test_strategy_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SwiftMoEStrategy(**kwargs)


@pytest.mark.parametrize(("given", "meant"), [("num_expert", "num_experts"), ("capacity", "capacity_factor")])
def test_names_of_layer_arguments(given, meant):
    with pytest.raises(TypeError, match=f"MoE got an unexpected keyword argument '{given}'; did you mean '{meant}'"):
        MoE(8, 16, **{given: 4})
    assert list(inspect.signature(MoE).parameters)[:3] == ["hidden_size", "ffn_size", "num_experts"]


def test_callback_arguments():
    with pytest.raises(TypeError, match=r"ExpertRebalancer got .* 'every_n_step'; did you mean 'every_n_steps'"):
        ExpertRebalancer(every_n_step=2)
    with pytest.raises(ValueError, match="unknown placement policy 'hottest'; there are auto"):
        ExpertRebalancer(policy="hottest")
    with pytest.raises(ValueError, match=r"'proportinal'; there are .*; did you mean 'proportional'"):
        ExpertRebalancer(policy="proportinal")
    with pytest.raises(TypeError, match=r"policy must be a name .auto, .* or a function .*, got None"):
        ExpertRebalancer(policy=None)
    with pytest.raises(ValueError, match="trace must be None or a file to write, got 3"):
        ExpertRebalancer(trace=3)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
def test_cadence(value):
    with pytest.raises(ValueError, match=f"every_n_steps must be a positive integer, got {value!r}"):
        ExpertRebalancer(every_n_steps=value)


def test_policies_take_three_arguments():
    with pytest.raises(TypeError, match=r"policy '<lambda>' must be called with .* but it takes \(loads\)"):
        ExpertRebalancer(policy=lambda loads: loads)
    with pytest.raises(TypeError, match=r"'RandomPolicy' must be called with .* \(an object of the class"):
        ExpertRebalancer(policy=RandomPolicy)


def fit_alone(job, *, callbacks=(), module=None, **kwargs):
    trainer = make_trainer(job, SwiftMoEStrategy(slots_per_rank=job.slots), callbacks=list(callbacks), **kwargs)
    trainer.fit(module or Net(job), data(job))


def assert_no_process_group(*_):
    assert not dist.is_initialized()


def test_too_few_slots_before_any_process_group():
    with pytest.raises(ValueError, match=r"layer 'moes\.0': 1 ranks x 2 slots .* slots_per_rank that works is 5"):
        fit_alone(Job(slots=2))
    assert_no_process_group()


POLICIES = {
    "None": lambda loads, cluster, previous: None,
    "'static'": lambda loads, cluster, previous: "static",
    "ndarray of shape .5,. and int64": lambda loads, cluster, previous: loads,
    "ndarray of shape .1, 5. and float64": lambda loads, cluster, previous: previous.table + 0.5,
    r"\[\[0, 1\], \[2\]\]": lambda loads, cluster, previous: [[0, 1], [2]],
    r"\(Placement": lambda loads, cluster, previous: (previous,),
}


@pytest.mark.parametrize("got", POLICIES)
@pytest.mark.parametrize("virtual", [False, True])
def test_a_policy_that_returns_no_placement(monkeypatch, got, virtual):
    monkeypatch.setattr(Net, "training_step", lambda *_: pytest.fail("training began"))
    message = rf"policy '<lambda>' returned an invalid placement: .*, got {got}.*; return a Placement, or .*\(1, 5\)"
    callback = VirtualCluster(1, 5, policy=POLICIES[got]) if virtual else ExpertRebalancer(POLICIES[got])
    strategy = "auto" if virtual else SwiftMoEStrategy(slots_per_rank=5)
    job = Job()
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(job, strategy, callbacks=[callback]).fit(Net(job), data(job))
    assert "\n" not in str(caught.value)
    assert_no_process_group()


class Counts:
    """A policy that remembers how often it was asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, loads, cluster, previous):
        self.asked += 1
        return previous


def test_a_policy_does_not_notice_that_it_was_tried():
    policy = Counts()
    fit_alone(Job(slots=5, steps=3), callbacks=[ExpertRebalancer(policy)])
    assert policy.asked == 3 * 2  # steps and layers


class BringsStatic(Net):
    def configure_callbacks(self):
        return [ExpertRebalancer("static")]


TWO = r"one ExpertRebalancer, but the Trainer has .*policy='random_policy'\), .*policy='static'\): keep one"


def random_policy(loads, cluster, previous):
    return RandomPolicy()(loads, cluster, previous)


def test_two_rebalancers():
    with pytest.raises(ValueError, match=TWO):
        fit_alone(Job(slots=5), callbacks=[ExpertRebalancer(random_policy), ExpertRebalancer("static")])
    with pytest.raises(ValueError, match=r"one ExpertRebalancer, but the Trainer has .* keep one"):
        make_trainer(Job(), callbacks=[VirtualCluster(2), ExpertRebalancer()]).fit(Net(Job()), data(Job()))
    assert_no_process_group()


def test_a_rebalancer_of_the_module_counts():
    job = Job(slots=5, steps=2)
    trainer = make_trainer(job, SwiftMoEStrategy(slots_per_rank=5))
    trainer.fit(BringsStatic(job), data(job))
    (rebalancer,) = [c for c in trainer.callbacks if isinstance(c, ExpertRebalancer)]
    assert rebalancer.state.steps == 2
    assert "moe/token_survival" in trainer.callback_metrics


def test_a_rebalancer_without_the_strategy_says_that_it_does_nothing():
    job = Job(steps=1)
    with pytest.warns(UserWarning, match="ExpertRebalancer does nothing in a Trainer with SingleDeviceStrategy"):
        make_trainer(job, callbacks=[ExpertRebalancer()]).fit(Net(job), data(job))


class Dense(Net):
    def __init__(self, job):
        super().__init__(job)
        layers = [*self.moes]
        del self.moes
        self.moes = layers  # a list hides modules from torch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_layers_is_told():
    with pytest.warns(UserWarning, match="Dense has no MoE layer, and is trained as by DDP: make layers"):
        fit_alone(Job(slots=5, steps=1, precision="32-true"), module=Dense(Job()))


class ReplacesLayer(Net):
    def on_train_start(self):
        self.moes[1] = MoE(self.job.width, 5, 5).double()


def test_a_layer_that_comes_too_late():
    with pytest.raises(RuntimeError, match=r"layer 'moes\.1' came into the module after the strategy was set up"):
        fit_alone(Job(slots=5), module=ReplacesLayer(Job()))


class NoOptimizer(Net):
    def configure_optimizers(self):
        return None


def test_no_optimizer():
    with pytest.raises(ValueError, match=r"up_proj is trainable but in no optimizer \(there is none\): pass it"):
        fit_alone(Job(slots=5), module=NoOptimizer(Job()))


def test_a_checkpoint_that_is_not_there(tmp_path):
    job = Job(slots=5)
    trainer = make_trainer(job, SwiftMoEStrategy(slots_per_rank=5))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*nothing\.ckpt"):
        trainer.fit(Net(job), data(job), ckpt_path=str(tmp_path / "nothing.ckpt"))


def test_unsupported_precision():
    with pytest.raises(ValueError, match="precision '16-true' is not supported; choose one of 32-true"):
        fit_alone(Job(slots=5, precision="16-true"))
    assert_no_process_group()


@pytest.mark.parametrize("callback", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(0.1)])
def test_stock_weight_averaging(callback):
    with pytest.raises(ValueError, match=r"averages parameters by position.*use lightning_swiftmoe\.WeightEMA"):
        fit_alone(Job(slots=5), callbacks=[callback()])
    assert_no_process_group()


def fit_on_ranks(job):
    our_trainer(job).fit(Net(job), data(job, dist.get_rank(), dist.get_world_size()))


def test_trainable_expert_in_no_optimizer():
    def forgetful(module):
        return torch.optim.SGD([p for n, p in module.named_parameters() if "moes.1.experts.up" not in n], lr=0.1)

    message = r"moes\.1\.experts\.up_proj is trainable but in no optimizer"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, fit_on_ranks, Job(slots=3, optimizer=forgetful))


def test_frozen_experts_are_legal_and_stay():
    before, after = run_ranks(2, fit_frozen)[0]
    assert torch.equal(before, after)


def fit_frozen():
    job = Job(slots=3, optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    module = Net(job)
    module.moes[0].experts.up_proj.requires_grad_(False)
    before = module.moes[0].experts.up_proj.detach().clone().double()
    our_trainer(job).fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return before, module.moes[0].experts.up_proj.detach()


def test_other_lightning_namespace_is_named():
    import pytorch_lightning

    assert "pytorch_lightning.strategies" in sys.modules
    refuse_other_namespace(["swiftmoe"])
    with pytest.raises(ImportError, match=r"supports lightning\.pytorch only"):
        pytorch_lightning.Trainer(strategy="swiftmoe", accelerator="cpu", logger=False)


IMPORTED_LATER = """
import lightning_swiftmoe
import pytorch_lightning
pytorch_lightning.Trainer(strategy="swiftmoe", accelerator="cpu", logger=False)
"""


def test_other_lightning_namespace_that_comes_later():
    done = subprocess.run([sys.executable, "-c", IMPORTED_LATER], capture_output=True, text=True)
    assert "ImportError: lightning_swiftmoe supports lightning.pytorch only" in done.stderr.splitlines()[-1]


def fit_with_empty_batch():
    job = Job(slots=3, optimizer=sgd)
    rank = dist.get_rank()
    batches = data(job, 0, 1)
    keep = 0 if rank == 1 else job.batch
    batches.x, batches.y = batches.x[:, :keep], batches.y[:, :keep]
    module = Net(job)
    our_trainer(job).fit(module, batches)
    return module.state_dict()


class Halved(Net):
    """What a mean over two ranks makes of a loss that one of them has no tokens for."""

    def loss(self, batch):
        return super().loss(batch) / 2


def test_an_empty_batch_takes_part_with_zero_tokens():
    job = Job(slots=3, optimizer=sgd)
    expected = Halved(job).double()
    make_trainer(job).fit(expected, data(job))
    for result in run_ranks(2, fit_with_empty_batch):
        assert largest_error(result, expected.state_dict()) < 1e-9


class Poisoned(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 else loss


def fit_poisoned():
    job = Job(slots=3, optimizer=sgd, policy="proportional")
    trainer = our_trainer(job)
    trainer.fit(Poisoned(job), data(job, dist.get_rank(), dist.get_world_size()))
    rebalancer = next(c for c in trainer.callbacks if isinstance(c, ExpertRebalancer))
    return list(rebalancer.state.placements.values())


def test_nan_losses_leave_a_valid_placement():
    first, second = run_ranks(2, fit_poisoned)
    assert first == second
    assert all({e for row in table for e in row} == set(range(5)) for table in first)
