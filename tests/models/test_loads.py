"""Loads on their way to the host arrive as they were."""

import pytest
import torch

from lightning_swiftmoe.layers.load import HostLoads, LayerLoad, no_load


def some_load(num_ranks, num_experts, dtype, num_forwards):
    counts = torch.randint(2**40, (num_ranks, num_experts))
    aux_loss = torch.rand((), dtype=dtype)
    return LayerLoad(counts, torch.randint(2**40, (num_ranks,)), aux_loss, torch.full_like(aux_loss, num_forwards))


def test_layers_of_any_shape_and_dtype():
    torch.manual_seed(0)
    loads = [
        some_load(2, 16, torch.float32, 1),
        no_load(2, 5, torch.device("cpu")),
        some_load(1, 3, torch.float64, 4),
        some_load(8, 64, torch.bfloat16, 2),
    ]
    on_host = HostLoads(loads).wait()
    for load, got in zip(loads, on_host, strict=True):
        assert got.counts.tolist() == load.counts.tolist()
        assert got.rank_load.tolist() == load.rank_load.tolist()
        assert got.counts.dtype == got.rank_load.dtype == "int64"
        assert got.aux_loss == load.aux_loss.item()
        assert got.num_forwards == load.num_forwards


@pytest.mark.parametrize("count", [0, 1, 3])
def test_sums_on_the_host_are_sums_on_the_device(count):
    torch.manual_seed(1)
    loads = [some_load(2, 4, torch.float64, 1) for _ in range(count)]
    on_host = HostLoads(loads).wait()
    assert len(on_host) == count
    if not loads:
        return
    wanted, got = loads[0], on_host[0]
    for load, other in zip(loads[1:], on_host[1:], strict=True):
        wanted, got = wanted + load, got + other
    assert got.counts.tolist() == wanted.counts.tolist()
    assert got.rank_load.tolist() == wanted.rank_load.tolist()
    assert (got.aux_loss, got.num_forwards) == (wanted.aux_loss.item(), wanted.num_forwards)
