"""Ranks lend experts' weights and get the gradients of all copies back."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_swiftmoe.parallel.borrowed_experts import Loans, borrow
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.transient_copies import lenders
from tests.ranks import run_ranks

NUM_EXPERTS = 7


def drawn(num_ranks, seed):
    rng = np.random.default_rng(seed)
    spare = -NUM_EXPERTS % num_ranks
    table = np.concatenate([rng.permutation(NUM_EXPERTS), rng.integers(NUM_EXPERTS, size=spare)])
    placement = Placement(table.reshape(num_ranks, -1), NUM_EXPERTS)
    return placement, (placement.multiplicity == 0) & (rng.random((num_ranks, NUM_EXPERTS)) < 0.8)


@pytest.mark.parametrize("seed", range(10))
def test_hosts_lend_in_turns(seed):
    placement, copied = drawn(5, seed)
    found = lenders(copied, placement)
    assert ((found >= 0) == copied).all()
    for expert in range(NUM_EXPERTS):
        used = found[copied[:, expert], expert]
        assert set(used) <= set(placement.hosts(expert))
        loans = [(used == host).sum() for host in placement.hosts(expert)]
        assert max(loans) - min(loans) <= 1
    every = [Loans.of(copied, placement, rank) for rank in range(5)]
    lends, borrows = np.array([loans.lends for loans in every]), np.array([loans.borrows for loans in every])
    assert (lends == borrows.T).all()
    assert borrows.sum(axis=1).tolist() == [loans.borrowed.size for loans in every] == copied.sum(axis=1).tolist()


def values(expert, offset):
    return torch.full((3, 2), float(expert + 1)) / 16 + offset


def scale_of(rank):
    """Of a rank's gradients: bf16 holds each of them, but not their sum on the way to a third."""
    return 1 + (rank + 1) * 2.0**-7


def lend_and_borrow(seed, dtype):
    communicator = Communicator(dist.group.WORLD)
    rank, num_ranks = communicator.rank, communicator.num_ranks
    placement, copied = drawn(num_ranks, seed)
    residents = placement.residents(rank)
    # One more than there are residents, as where a slot's memory stands empty.
    up, down = (
        torch.stack([*(values(e, offset) for e in residents), torch.zeros(3, 2)]).to(dtype).requires_grad_()
        for offset in (0, 100)
    )
    loans = Loans.of(copied, placement, rank)
    rows = torch.ones(rank, 2, dtype=dtype, requires_grad=True)
    passed, borrowed = borrow(rows, {"up": up, "down": down}, loans, communicator, "layer")
    up_copies, down_copies = borrowed["up"], borrowed["down"]
    for copies, offset in ((up_copies, 0), (down_copies, 100)):
        expected = [values(expert, offset).to(dtype) for expert in loans.borrowed]
        assert len(copies) == len(expected)
        assert all(torch.equal(copy, weight) for copy, weight in zip(copies, expected, strict=True))
    (3 * passed.sum() + scale_of(rank) * (up_copies.sum() - 2 * down_copies.sum())).backward()
    assert (rows.grad == 3).all()
    sent = communicator.meter.pop()["transient_copies"].sent_bytes
    assert sent == 2 * 6 * up.element_size() * (sum(loans.lends) + loans.borrowed.size)

    lender = lenders(copied, placement)
    for number, expert in enumerate(residents):
        borrowers = np.flatnonzero(lender[:, expert] == rank)
        total = sum(scale_of(j) for j in borrowers)
        assert (up.grad[number] == torch.tensor(total).to(dtype)).all()
        assert (down.grad[number] == torch.tensor(-2 * total).to(dtype)).all()
    assert (up.grad[-1] == 0).all()


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_copies_are_the_lenders_and_their_gradients_come_back(num_ranks, dtype):
    for seed in range(3):
        run_ranks(num_ranks, lend_and_borrow, seed, dtype)
