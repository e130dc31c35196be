"""Bytes counted by the exchange equal the closed formulas and what the operating system saw."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe.cli._measured import received_payload
from lightning_swiftmoe.exchange import Exchange
from tests.jobs import Job, Net, data, our_trainer, sgd
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Recorder(pl.Callback):
    """Every step as the rebalancer hears of it."""

    def __init__(self, rebalancer="ExpertRebalancer"):
        self.steps, self.rebalancer = [], rebalancer

    def setup(self, trainer, pl_module, stage):
        rebalancer = next(c for c in trainer.callbacks if type(c).__name__ == self.rebalancer)
        end_step = rebalancer.end_step

        def record(step):
            self.steps.append(step)
            end_step(step)

        rebalancer.end_step = record


def record(job):
    recorder = Recorder()
    job.callbacks = lambda: [recorder]
    trainer, module = our_trainer(job), Net(job)
    trainer.fit(module, data(job, dist.get_rank(), dist.get_world_size()))
    return dist.get_rank(), recorder.steps


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_closed_formulas(num_ranks):
    job = Job(num_experts=5, slots=3, policy="random", optimizer=sgd)
    elements = [5 * 6, 6 * 5]  # up and down projection of one expert
    chunk = sum(-(-p // num_ranks) for p in elements)
    for rank, steps in run_ranks(num_ranks, record, job):
        for step in steps[1:]:
            gradient = sum(layer.placement.residents(rank).size * (num_ranks - 1) * chunk * 8 for layer in step.layers)
            weight = sum(
                sum(layer.next_placement.residents(j).size for j in range(num_ranks) if j != rank) * chunk * 8
                for layer in step.layers
            )
            load = len(step.layers) * (num_ranks - 1) * 5 * 8
            assert step.traffic["gradient"].sent_bytes == gradient
            assert step.traffic["weight"].sent_bytes == weight
            assert step.traffic["load"].sent_bytes == load
            # Optimizer state never moves: nothing else is sent between two steps.
            assert step.traffic["setup"].sent_bytes == step.traffic["checkpoint"].sent_bytes == 0


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
    exchange = Exchange(dist.group.WORLD)
    rank, n = exchange.rank, exchange.num_ranks
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 5, size=(n, n))  # rows from i to j, uneven
    rows = torch.randn(int(counts[rank].sum()), num_bytes // 80, dtype=torch.float64)
    send, recv = counts[rank].tolist(), counts[:, rank].tolist()
    exchange.all_to_all(rows[:, :1].contiguous(), send, recv, "weight", "warm up")
    exchange.pop_traffic()
    dist.barrier()
    before = received_payload()
    dist.barrier()
    exchange.all_to_all(rows, send, recv, "weight", "test")
    dist.barrier()
    arrived = (sum(recv) - recv[rank]) * rows[0].nbytes
    return exchange.pop_traffic()["weight"].sent_bytes, arrived, received_payload() - before


def test_the_operating_system_counts_the_same():
    results = run_ranks(3, exchange_much, 20_000_000)
    assert sum(sent for sent, _, _ in results) == sum(arrived for _, arrived, _ in results) > 30_000_000
    for _, arrived, seen in results:
        # Above it: the headers of the messages, and two barriers.
        assert arrived <= seen <= arrived + 10_000
