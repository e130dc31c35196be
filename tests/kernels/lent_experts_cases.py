"""Ranks that lend each other experts, all in one process: the kernels beside loops over loans."""

import numpy as np
import torch

from lightning_swiftmoe.kernels.shards.lent_experts import (
    Loans,
    collect_gradients,
    collect_gradients_reference,
    fetch_experts,
    fetch_experts_reference,
    offer_gradients,
    offer_gradients_reference,
)
from lightning_swiftmoe.kernels.token_dispatch.borrow import borrow_experts_reference
from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses
from lightning_swiftmoe.placement.exact_split import exact_split
from tests.kernels.token_dispatch.cases import random_placement


def random_loans(seed: int, device: torch.device) -> list[Loans]:
    """Of every rank; experts with several borrowers, lenders of several experts, ranks that borrow nothing."""
    rng = np.random.default_rng(seed)
    num_ranks = [1, 2, 3, 5, 8][seed % 5]
    most = 1 + seed % 2
    num_experts = int(rng.integers(num_ranks, 2 * num_ranks + 2))
    slots = -(-num_experts // num_ranks) + int(rng.integers(2))
    placement = random_placement(rng, num_ranks, slots, num_experts)
    load = rng.multinomial(1000 * num_ranks, rng.dirichlet(np.full(num_experts, 0.3)))
    share = torch.tensor(exact_split(load, placement), dtype=torch.int32)
    multiplicity = torch.tensor(placement.multiplicity, dtype=torch.int32)
    copies, lenders = borrow_experts_reference(share, multiplicity, most)
    tensors = [tensor.to(device) for tensor in (copies, lenders, multiplicity)]
    return [Loans(*tensors, rank) for rank in range(num_ranks)]


def check(seed: int, dtype: torch.dtype, device: torch.device, size: int = 52) -> None:
    """Weights, then gradients there and back."""
    torch.manual_seed(seed)
    of_ranks = random_loans(seed, device)
    most = of_ranks[0].most
    rows = int((of_ranks[0].multiplicity > 0).sum(dim=1).max()) + most

    def held(rows: int) -> list[torch.Tensor]:
        return [torch.randn(rows, size, device=device).to(dtype) for _ in of_ranks]

    def addresses(tensors: list[torch.Tensor]) -> torch.Tensor:
        return peer_addresses([tensor.data_ptr() for tensor in tensors], device)

    weights = held(rows)
    expected = [tensor.clone() for tensor in weights]
    for loans, here in zip(of_ranks, weights, strict=True):
        fetch_experts(loans, here, addresses(weights))
        fetch_experts_reference(loans, expected)
    assert all(torch.equal(got, want) for got, want in zip(weights, expected, strict=True))

    grads, offered = held(rows), held(most)
    expected, expected_offers = [tensor.clone() for tensor in grads], [tensor.clone() for tensor in offered]
    for loans, grad, wanted, offer, expected_offer in zip(
        of_ranks, grads, expected, offered, expected_offers, strict=True
    ):
        offer_gradients(loans, grad, offer)
        offer_gradients_reference(loans, wanted, expected_offer)
    assert all(torch.equal(got, want) for got, want in zip(offered, expected_offers, strict=True))
    for loans, grad, wanted in zip(of_ranks, grads, expected, strict=True):
        collect_gradients(loans, grad, addresses(offered))
        collect_gradients_reference(loans, wanted, offered)
    assert all(torch.equal(got, want) for got, want in zip(grads, expected, strict=True))
