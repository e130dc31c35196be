"""Ranks on GPUs, an arbitrary placement on every step, and the weights of one GPU without the strategy."""

import copy

import pytest
import torch

from lightning_swiftmoe.placement.exact_split import exact_split
from tests.gpu.cases import (
    HOPPER,
    TRANSPORTS,
    Checkpointed,
    Compiled,
    CompiledInEvalMode,
    EditsBetween,
    GpuJob,
    OneSided,
    ReentrantCheckpointed,
    ShortOfOne,
    Starved,
    Twice,
    fit,
    fit_alone,
)
from tests.gpu.compilations import Wandering
from tests.gpu.rank_pool import NUM_RANKS
from tests.jobs import InEvalMode, largest_error

pytestmark = pytest.mark.gpu

BOUND = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 2e-2}
WIDE = {"width": 64, "moe": HOPPER}
STARVED = {**HOPPER, "bias_update_rate": 1e-3}
# Hidden values as wide as what is kept of them: memory of one kind would fit in the place of the other.
UNGATED = {"ffn_size": 128, "activation": "gelu", "bias_update_rate": 1e-3}

# No expert has two hosts: the exact split leaves ranks as uneven as they are, and one borrows.
COPIES = {"num_experts": 2 * NUM_RANKS, "slots": 2, "strategy": {"split": "exact", "transient_copies": 1}, **WIDE}

ONE_SIDED = {
    "num_experts": 2 * NUM_RANKS,
    "slots": 2,
    "policy": "static",
    "batch": 1024,
    "width": 64,
    "moe": STARVED,
}

# By precision, so that both have each.
SHAPES = {
    "hopper_k1": {"top_k": 1, **WIDE},
    "hopper_k2": {"top_k": 2, **WIDE},
    "odd_k1": {"top_k": 1},
    "odd_k2": {"top_k": 2},
    "grouped": {"width": 24, "moe": {"ffn_size": 40}},
}
VARIANTS = {
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}, **WIDE},
    "edits_between": {"module": EditsBetween, "trainer": {"accumulate_grad_batches": 2}, **WIDE},
    "clip": {"trainer": {"gradient_clip_val": 0.05}, **WIDE},
    # Of more ranks a larger part has tokens: gradients are larger, and bf16 drifts apart sooner.
    "empty_rank": {"empty_rank": 1, "steps": 9 if NUM_RANKS == 2 else 7, **WIDE},
    "starved": {"module": Starved, "width": 64, "moe": STARVED},
    "validates": {"validates": True, **WIDE},
    "validates_unevenly": {"validates": True, "uneven": True, **WIDE},
    "checkpointed": {"module": Checkpointed, **WIDE},
    "reentrant": {"module": ReentrantCheckpointed, **WIDE},
    "twice": {"module": Twice, **WIDE},
    "in_eval_mode": {"module": InEvalMode, **WIDE},
    "static": {"policy": "static", "slots": 5, **WIDE},
    "fsdp2": {"strategy": {"dense": "fsdp2"}, "trainer": {"gradient_clip_val": 0.05}, "validates": True, **WIDE},
    "copies": COPIES,
    "copies_odd": {"num_experts": 2 * NUM_RANKS, "slots": 2, "strategy": COPIES["strategy"]},
    "copies_accumulate": {"trainer": {"accumulate_grad_batches": 2}, **COPIES},
    "copies_twice": {"module": Twice, **COPIES},
    "copies_checkpointed": {"module": Checkpointed, **COPIES},
    "copies_validate": {"validates": True, **COPIES},
    "compiled": {"module": Compiled, "validates": True, **WIDE},
    "compiled_accumulate": {"module": Compiled, "trainer": {"accumulate_grad_batches": 2}, **WIDE},
    # One rank hosts all that is chosen: for half of its rows nothing is kept until the backward.
    "one_sided": {"module": OneSided, **ONE_SIDED},
    "one_sided_accumulate": {"module": OneSided, "trainer": {"accumulate_grad_batches": 2}, **ONE_SIDED},
    # Room for rows grows in one layer and then in another, and their graphs are recorded in any order. In fp64
    # two ranks are within 6e-15 after any number of steps; in fp32, on GPUs, within 2.5e-6 after 25 and 1e-5 after 30.
    "wandering": {
        "module": Wandering,
        "policy": "balanced",
        "slots": 9,
        "steps": 25,
        "on_device": True,
        "width": 64,
        "moe": UNGATED,
    },
}
# What is of one precision only.
SPECIAL = {
    "travels_wide": {"strategy": {"gradient_dtype": "float32"}, **WIDE},
    "travels_narrow": {"strategy": {"gradient_dtype": "bfloat16"}, "trainer": {"accumulate_grad_batches": 2}, **WIDE},
    "compiled_in_eval_mode": {"module": CompiledInEvalMode, **WIDE},
}
CASES = {**SHAPES, **VARIANTS, **SPECIAL}
COMBINATIONS = [
    *((case, precision) for precision in ("32-true", "bf16-mixed") for case in (*SHAPES, *VARIANTS)),
    ("travels_wide", "bf16-mixed"),
    ("travels_narrow", "32-true"),
    ("compiled_in_eval_mode", "32-true"),
    *((case, "16-mixed") for case in ("hopper_k2", "odd_k1", "accumulate", "clip", "empty_rank")),
]
ONE_RANK = ["hopper_k1", "hopper_k2", "odd_k2", "accumulate", "starved", "checkpointed"]


# One process and two over gloo drift apart in bf16 as well: 0.6 % after 15 of these steps, 13 % after 30. One process
# that is compiled and one that is not do so sooner: 1.6 % after 5, 4.8 % after 9.
MOST_STEPS = {"32-true": 30, "bf16-mixed": 15, "16-mixed": 15}
MOST_COMPILED_STEPS = {"32-true": 30, "bf16-mixed": 5}


def make(case, precision, transport="auto"):
    job = GpuJob(precision=precision, transport=transport, **copy.deepcopy(CASES[case]))
    most = MOST_COMPILED_STEPS if issubclass(job.module, Compiled) else MOST_STEPS
    job.steps = min(job.steps, most[precision])
    return job


@pytest.fixture(scope="module")
def expected(one):
    """The weights of one process without the strategy, trained once."""
    known = {}

    def of(case, precision):
        if (case, precision) not in known:
            job = make(case, precision)
            if job.empty_rank is not None:
                job.module, job.empty_rank = ShortOfOne, None
            known[case, precision] = one.run(fit_alone, job)[0]
        return known[case, precision]

    return of


def borrows(layer):
    """Whether a rank processed what no host of an expert could have."""
    return exact_split(layer.loads, layer.placement).sum(axis=1).tolist() != layer.rank_load.tolist()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("case", "precision"), COMBINATIONS)
def test_ranks_equal_one_process(several, expected, case, precision, transport):
    want = expected(case, precision)
    first, *others = several.run(fit, make(case, precision, transport))
    for other in others:
        assert all(torch.equal(first.weights[key], other.weights[key]) for key in first.weights)
    bound = BOUND["bf16-mixed" if case == "travels_narrow" else precision]
    assert largest_error(first.weights, want.weights) < bound
    if case != "validates_unevenly":  # a mean of the ranks' means is not that of all batches
        assert first.metrics == pytest.approx(want.metrics, rel=bound)
    if case == "copies":
        assert sum(borrows(layer) for step in first.steps for layer in step.layers) > 5
    if case.startswith("one_sided"):
        assert all(layer.excess_load > 0.4 for step in first.steps for layer in step.layers)
    if case == "starved":
        assert all((layer.loads[-2:] == 0).all() for step in first.steps for layer in step.layers)


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("case", ONE_RANK)
def test_one_rank_equals_one_process(one, expected, case, precision):
    want = expected(case, precision)
    job = make(case, precision)
    job.slots = 6
    assert largest_error(one.run(fit, job)[0].weights, want.weights) < BOUND[precision]
