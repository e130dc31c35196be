"""State bound to the hosts really moves, to the byte, and training stays that of one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.bound_shards import BoundShards
from lightning_swiftmoe.placement.flexmoe import FlexMoEPolicy
from lightning_swiftmoe.placement.transfer import moved_elements, transfer_plan
from tests.jobs import Job, Net, adamw, data, largest_error, our_trainer, sgd, train, train_alone
from tests.ranks import run_ranks
from tests.strategy.test_bytes import record
from tests.strategy.test_checkpoint import moments, resume, save_in_fit
from tests.strategy.test_master_oracle import compare

pytestmark = pytest.mark.distributed

BOUND = {"optimizer_state": "bound"}
SIZES = [5 * 6, 6 * 5]  # up and down projection of one expert
POLICIES = {"static": "static", "flexmoe": FlexMoEPolicy(), "random": "random"}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_equal_one_process(num_ranks, optimizer, policy):
    slots = -(-5 // num_ranks) + 1
    compare(num_ranks, Job(optimizer=optimizer, slots=slots, policy=POLICIES[policy], strategy=BOUND), 1e-9)


VARIANTS = {
    "one_slot": {"num_experts": 3, "slots": 1},
    "more_slots_than_experts": {"num_experts": 2, "slots": 5},
    "clip_and_accumulate": {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "clip_value": {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "offload": {"strategy": {"offload_optimizer": True, **BOUND}},
    "accumulate_bf16": {"precision": "bf16-mixed", "optimizer": sgd, "trainer": {"accumulate_grad_batches": 2}},
    "frozen_down": {"optimizer": lambda module: freeze_down(module)},
    "adagrad": {
        "optimizer": lambda module: torch.optim.Adagrad(module.parameters(), 0.05, initial_accumulator_value=0.1)
    },
}


def freeze_down(module):
    for moe in module.moes:
        moe.experts.down_proj.requires_grad_(False)
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    job = Job(**{"strategy": BOUND, **VARIANTS[variant]})
    compare(3, job, 2e-2 if job.precision == "bf16-mixed" else 1e-9)


def test_more_hosts_than_elements():
    # One input and one output of width 6 for each expert: four hosts take two elements each, and the last owns none.
    job = Job(num_experts=2, slots=2, moe={"ffn_size": 1}, strategy=BOUND, policy="proportional")
    assert BoundShards(6, Placement([[0, 1]] * 4, 2)).size(3) == 0
    compare(4, job, 1e-9)


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("optimizer", "num_tensors"), [(sgd, 2), (adamw, 3)])
@pytest.mark.parametrize("policy", ["flexmoe", "random"])
def test_bytes_of_every_phase(num_ranks, optimizer, num_tensors, policy):
    job = Job(slots=3, steps=8, optimizer=optimizer, policy=POLICIES[policy], strategy=BOUND)
    results = run_ranks(num_ranks, record, job)
    moved = 0
    for rank, steps in results:
        for step in steps[1:]:
            gradient = migration = weight = 0
            for layer in step.layers:
                for size in SIZES:
                    here, there = BoundShards(size, layer.placement), BoundShards(size, layer.next_placement)
                    residents = layer.placement.residents(rank)
                    gradient += residents.size * size - here.size(rank)
                    # Sent when the step began, under the placement that was in force in it.
                    weight += sum(
                        p.num_elements * (here.placement.hosts(e).size - 1) for e, p in here.pieces(rank).items()
                    )
                    sent, _ = moved_elements(transfer_plan(here, there, range(5)), num_ranks)
                    migration += num_tensors * sent[rank]
            assert step.traffic["gradient"].sent_bytes == 8 * gradient
            assert step.traffic["weight"].sent_bytes == 8 * weight
            assert step.traffic["migration"].sent_bytes == 8 * migration
            moved += migration
    assert moved > 0 or policy == "flexmoe"  # which moves an expert only where that pays


def test_decoupled_state_never_moves():
    for _, steps in run_ranks(3, record, Job(slots=3)):
        assert any(layer.placement != layer.next_placement for step in steps for layer in step.layers)
        assert all(step.traffic["migration"].sent_bytes == 0 for step in steps)


@pytest.mark.parametrize("saved", ["bound", "decoupled"])
@pytest.mark.parametrize("resumed", ["bound", "decoupled"])
def test_checkpoints_know_nothing_of_it(tmp_path, saved, resumed):
    job = Job(slots=3, steps=6, policy="random")
    before, after = (
        dataclasses.replace(job, strategy={"optimizer_state": state}, trainer={"max_steps": steps})
        for state, steps in ((saved, 3), (resumed, 6))
    )
    half, end = str(tmp_path / "half.ckpt"), str(tmp_path / "end.ckpt")
    run_ranks(2, save_in_fit, before, half)
    result = run_ranks(3, resume, half, end, after)[0]
    alone = str(tmp_path / "alone.ckpt")
    assert largest_error(result, train_alone(job, save=alone)) < 1e-9
    assert largest_error(moments(end), moments(alone)) < 1e-9


def test_state_that_is_not_element_wise_is_refused():
    message = "keeps state 'row' of shape \\(3,\\) for moes.0.experts.up_proj"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(2, train, Job(slots=3, optimizer=lambda module: WithRow(module.parameters(), lr=0.1), strategy=BOUND))


class WithRow(torch.optim.SGD):
    """Keeps three numbers for every parameter."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["row"] = torch.zeros(3)
        return loss


class DenseFirst(Net):
    """One optimizer for everything but experts, and behind it one for all of them, which has moments."""

    automatic_optimization = False

    def configure_optimizers(self):
        experts = [p for name, p in self.named_parameters() if ".experts." in name]
        rest = [p for name, p in self.named_parameters() if ".experts." not in name]
        return [torch.optim.SGD(rest, lr=0.1), torch.optim.AdamW(experts, lr=0.02)]

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_state_of_the_second_optimizer_moves():
    compare(3, Job(module=DenseFirst, trainer={"max_steps": 10}, strategy=BOUND), 1e-9)


class TwoOptimizers(Net):
    """Lightning asks for manual optimization where there are several."""

    automatic_optimization = False

    def configure_optimizers(self):
        params = list(self.parameters())
        return [torch.optim.SGD(part, lr=0.1) for part in (params[:6], params[6:])]


def fit_with_two_optimizers(job):
    our_trainer(job).fit(TwoOptimizers(job), data(job, dist.get_rank(), dist.get_world_size()))


def test_several_optimizers_with_experts_are_refused():
    with pytest.raises(RuntimeError, match="several optimizers hold experts"):
        run_ranks(2, fit_with_two_optimizers, Job(slots=3, strategy=BOUND))


def test_unknown_place_for_the_state():
    with pytest.raises(ValueError, match="optimizer_state must be one of decoupled, bound, got 'hosts'"):
        SwiftMoEStrategy(optimizer_state="hosts")
