"""Bytes counted by the exchange equal the closed formulas and what the operating system saw."""

import dataclasses

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe import ExpertRebalancer
from lightning_swiftmoe.cli._measured import received_payload
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.placement import EvenShards, TokenRule
from lightning_swiftmoe.placement.transient_copies import lenders
from tests.jobs import Job, Net, data, our_trainer, sgd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Recorder(pl.Callback):
    """Every step as the engine tells of it."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        rebalancer = next(c for c in trainer.callbacks if isinstance(c, ExpertRebalancer))
        rebalancer.engine.observers.append(self.steps.append)


def record(job):
    recorder = Recorder()
    job.callbacks = lambda: [recorder]
    trainer, module = our_trainer(job), Net(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return dist.get_rank(), recorder.steps


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_closed_formulas(num_ranks):
    job = Job(num_experts=5, slots=3, policy="random", optimizer=sgd)
    matrices = [(5, 6), (6, 5)]  # rows and columns of one expert's up and down projection
    cuts = [EvenShards(*matrix, num_ranks) for matrix in matrices]
    for rank, steps in run_ranks(num_ranks, record, job):
        others = sum(cut.num_elements - cut.size(rank) for cut in cuts)
        mine = sum(cut.size(rank) for cut in cuts)
        for step in steps[1:-1]:
            gradient = sum(layer.placement.residents(rank).size * others * 8 for layer in step.layers)
            # Sent when the step began, to where the one before it put the experts.
            weight = sum(
                sum(layer.placement.residents(j).size for j in range(num_ranks) if j != rank) * mine * 8
                for layer in step.layers
            )
            load = len(step.layers) * (num_ranks - 1) * 5 * 8
            assert step.traffic["gradient"].sent_bytes == gradient
            assert step.traffic["weight"].sent_bytes == weight
            assert step.traffic["load"].sent_bytes == load
            # Optimizer state never moves: nothing else is sent between two steps.
            assert step.traffic["setup"].sent_bytes == step.traffic["checkpoint"].sent_bytes == 0


@pytest.mark.parametrize("state", ["decoupled", "bound"])
@pytest.mark.parametrize(("dtype", "element_bytes"), [("bfloat16", 2), ("float32", 4), ("auto", 8)])
def test_gradients_travel_in_the_type_asked_for(dtype, element_bytes, state):
    """In 64-true: the other phases are as before."""
    job = Job(num_experts=4, slots=4, policy="static", optimizer=sgd)
    asked = dataclasses.replace(job, strategy={"gradient_dtype": dtype, "optimizer_state": state})
    plain = run_ranks(2, record, dataclasses.replace(job, strategy={"optimizer_state": state}))
    for (_, steps), (_, plain_steps) in zip(run_ranks(2, record, asked), plain, strict=True):
        for step, other in zip(steps[1:-1], plain_steps[1:-1], strict=True):
            assert 0 < step.traffic["gradient"].sent_bytes * 8 == other.traffic["gradient"].sent_bytes * element_bytes
            assert step.traffic["weight"].sent_bytes == other.traffic["weight"].sent_bytes


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_transient_copies_send_what_is_lent_and_its_gradient_back(num_ranks):
    strategy = {"split": "exact", "capacity_scope": "pooled", "transient_copies": 2}
    job = Job(num_experts=5, slots=2, policy="random", strategy=strategy)
    copies = 0
    for rank, steps in run_ranks(num_ranks, record, job):
        for step in steps:
            lent = borrowed = 0
            for layer in step.layers:
                shares = TokenRule("pooled", "exact", 2).share_out(layer.counts, layer.placement, None)
                if shares.copied is not None:
                    lent += np.count_nonzero(lenders(shares.copied, layer.placement) == rank)
                    borrowed += np.count_nonzero(shares.copied[rank])
            assert step.traffic["transient_copies"].sent_bytes == (lent + borrowed) * 60 * 8
            copies += borrowed
    assert copies > 5


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_never_above_the_published_volume(num_ranks):
    # The paper's total is s*N*G in and s*N*W out; residents are at most slots.
    job = Job(num_experts=4, slots=2, policy="proportional")
    results = run_ranks(num_ranks, record, job)
    expert_bytes = 60 * 8
    for index in range(1, job.steps):
        for phase in ("gradient", "weight"):
            total = sum(steps[index].traffic[phase].sent_bytes for _, steps in results)
            layers = results[0][1][index].layers
            assert total <= len(layers) * 2 * num_ranks * expert_bytes * (num_ranks - 1) / num_ranks


def exchange_much(num_bytes):
    communicator = Communicator(dist.group.WORLD)
    rank, n = communicator.rank, communicator.num_ranks
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 5, size=(n, n))  # rows from i to j, uneven
    rows = torch.randn(int(counts[rank].sum()), num_bytes // 80, dtype=torch.float64)
    send, recv = counts[rank].tolist(), counts[:, rank].tolist()
    communicator.all_to_all(rows[:, :1].contiguous(), send, recv, "weight", "warm up")
    communicator.meter.pop()
    dist.barrier()
    before = received_payload()
    dist.barrier()
    communicator.all_to_all(rows, send, recv, "weight", "test")
    dist.barrier()
    arrived = (sum(recv) - recv[rank]) * rows[0].nbytes
    return communicator.meter.pop()["weight"].sent_bytes, arrived, received_payload() - before


def test_the_operating_system_counts_the_same():
    results = run_ranks(3, exchange_much, 20_000_000)
    assert sum(sent for sent, _, _ in results) == sum(arrived for _, arrived, _ in results) > 30_000_000
    for _, arrived, seen in results:
        # Above it: the headers of the messages, and two barriers.
        assert arrived <= seen <= arrived + 10_000
