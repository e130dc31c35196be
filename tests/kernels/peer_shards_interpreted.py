"""Checks of the peer shard kernels in the interpreter. Run as a module in its own process: the switch is read on
import."""

import itertools

import torch

from lightning_swiftmoe.kernels.indirect import point, pointed
from lightning_swiftmoe.kernels.shards.peer_shards import (
    Residents,
    pull_shards,
    pull_shards_reference,
    push_shards,
    push_shards_reference,
)
from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses

CPU = torch.device("cpu")
CASES = [
    # experts of every rank, experts, elements of one, bounds
    ([[0, 2], [2]], 3, 24, [0, 12, 24]),
    ([[0, 1, 2, 3], [0, 1, 2, 3]], 4, 40, [0, 20, 40]),
    ([[1], [0, 1], [2]], 3, 50, [0, 20, 40, 50]),
    ([[0], [0], [0], [0]], 1, 6, [0, 2, 4, 6, 6]),
]


def check(experts: list[list[int]], num_experts: int, size: int, bounds: list[int], dtype: torch.dtype) -> None:
    places = Residents.of(experts, num_experts)
    within = Residents.within(places.pack(room=20), num_experts)
    most = max(len(here) for here in experts) + 1
    held = [torch.full((most, size), 7.0, dtype=dtype) for _ in experts]
    expected = [tensor.clone() for tensor in held]
    addresses = peer_addresses([tensor.data_ptr() for tensor in held], CPU)
    for start, stop in itertools.pairwise(bounds):
        shard = torch.randn(num_experts, stop - start)
        push_shards(shard, places, addresses, size, start, dtype)
        push_shards_reference(shard, places, expected, start)
    for got, want, here in zip(held, expected, experts, strict=True):
        assert torch.equal(got, want)
        assert (got[: len(here)] != 7).all()
        assert (got[len(here) :] == 7).all()
    for start, stop in itertools.pairwise(bounds):
        total = torch.full((num_experts, stop - start), 7.0)
        oracle = total.clone()
        pull_shards(total, places, addresses, size, start, dtype, 0.25)
        pull_shards_reference(oracle, places, held, start, 0.25)
        assert torch.equal(total, oracle)
        found, cells = torch.full_like(total, 7.0), torch.zeros(1, dtype=torch.int64)
        point(cells, [found])
        pull_shards(*pointed(cells, [found]), within, addresses, size, start, dtype, 0.25)
        assert torch.equal(found, oracle)


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES:
        for kind in (torch.float32, torch.float16):
            check(*case, kind)
    print("ok")
