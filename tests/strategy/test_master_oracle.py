"""The master test: N ranks, an arbitrary placement on every step, and the weights of one process."""

import numpy as np
import pytest
import torch

from lightning_swiftmoe.placement import Shares, TokenRule
from tests.jobs import Job, adamw, data, largest_error, our_trainer, sgd, train, train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def compare(num_ranks, job, bound, run=train):
    expected = train_alone(job)
    results = run_ranks(num_ranks, run, job)
    for result in results:
        assert largest_error(result, expected) < bound
    for result in results[1:]:
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("top_k", [1, 2])
def test_ranks_equal_one_process(num_ranks, optimizer, top_k):
    slots = -(-5 // num_ranks) + 1
    compare(num_ranks, Job(optimizer=optimizer, top_k=top_k, slots=slots), 1e-9)


@pytest.mark.parametrize(("num_ranks", "num_experts", "slots"), [(2, 7, 4), (3, 4, 2), (4, 3, 1), (3, 2, 5), (2, 2, 1)])
def test_uneven_experts_and_slots(num_ranks, num_experts, slots):
    compare(num_ranks, Job(num_experts=num_experts, slots=slots), 1e-9)


VARIANTS = {
    "clip_norm": {"trainer": {"gradient_clip_val": 0.05}},
    "clip_value": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "accumulate": {"trainer": {"accumulate_grad_batches": 3}},
    "clip_and_accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "every_loss": {"moe": {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
    "swiglu_shared_sigmoid": {"moe": {"activation": "swiglu", "shared_ffn_size": 4, "score": "sigmoid"}},
    "bias": {"moe": {"bias_update_rate": 0.01, "score": "sigmoid"}},
    "offload": {"strategy": {"offload_optimizer": True}},
    "auto_slots_balanced": {"slots": "auto", "policy": "balanced"},
    "proportional": {"policy": "proportional"},
    "static": {"policy": "static"},
    "adagrad": {
        "optimizer": lambda module: torch.optim.Adagrad(module.parameters(), 0.05, initial_accumulator_value=0.1)
    },
    "rmsprop": {"optimizer": lambda module: torch.optim.RMSprop(module.parameters(), 0.01)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    compare(3, Job(**VARIANTS[variant]), 1e-9)


class AnySplit(TokenRule):
    """Every batch of every layer splits its tokens by chance, over hosts and over ranks that borrow for it."""

    def share_out(self, counts, placement, capacity_factor):
        rng = np.random.default_rng([number.item() for number in counts.flatten()])
        copied = np.zeros(counts.shape, dtype=bool)
        for rank in range(placement.num_ranks):
            others = np.flatnonzero(placement.multiplicity[rank] == 0)
            borrowed = rng.permutation(others)[: rng.integers(self.transient_copies + 1)]
            copied[rank, borrowed] = True
        weights = ((placement.multiplicity > 0) | copied) * rng.random(counts.shape)
        upper = np.floor(np.cumsum(weights / weights.sum(axis=0), axis=0) * counts.sum(axis=0) + 1e-9)
        return Shares(counts, np.diff(upper.astype(np.int64), axis=0, prepend=0), copied if copied.any() else None)


def train_by_any_split(job):
    trainer, module = our_trainer(job), job.module(job)
    trainer.strategy.rule = AnySplit("cluster", "exact", transient_copies=2)
    trainer.fit(module, data(job, torch.distributed.get_rank(), torch.distributed.get_world_size()))
    return module.state_dict()


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": sgd, "trainer": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}},
        {"strategy": {"optimizer_state": "bound"}, "moe": {"activation": "swiglu", "aux_loss_coef": 0.1}},
    ],
)
def test_any_split_and_any_transient_copies(num_ranks, options):
    slots = -(-5 // num_ranks)
    compare(num_ranks, Job(slots=slots, **options), 1e-9, run=train_by_any_split)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_other_precisions(precision, accumulate):
    bound = {"32-true": 2e-5, "bf16-mixed": 2e-2, "bf16-true": 6e-2}[precision]
    # Adam turns a rounding of a tiny gradient into a full step; SGD keeps roundings their size.
    compare(2, Job(precision=precision, optimizer=sgd, slots=3, trainer={"accumulate_grad_batches": accumulate}), bound)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float32", 1e-6)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_travel_in_another_type(dtype, bound, accumulate):
    """As one process to that type's rounding, and no closer: they did travel in it."""
    job = Job(
        optimizer=sgd, slots=3, strategy={"gradient_dtype": dtype}, trainer={"accumulate_grad_batches": accumulate}
    )
    compare(2, job, bound)
    with pytest.raises(AssertionError):
        compare(2, job, 1e-11)


def test_learning_rate_schedules_reach_the_shards():
    class Scheduled(Job):
        pass

    def optimizer(module):
        adam = adamw(module)
        return {
            "optimizer": adam,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(adam, 0.5), "interval": "step"},
        }

    compare(2, Scheduled(optimizer=optimizer, slots=3), 1e-9)
