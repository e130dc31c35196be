"""The plan in plain torch against the numpy plan of the host."""

import numpy as np
import pytest
import torch

from lightning_swiftmoe.kernels.token_dispatch import move
from lightning_swiftmoe.kernels.token_dispatch.address import address_tokens
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.plan_reference import slot_capacity as device_capacity
from lightning_swiftmoe.kernels.token_dispatch.token_plan import Capacity, PlanSize
from lightning_swiftmoe.placement import slot_capacity
from tests.kernels.token_dispatch.cases import check_plan, check_send_order, random_case
from tests.kernels.token_dispatch.end_to_end import Cluster, check_packed


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("seed", range(60))
def test_plan_is_the_hosts(seed: int, layout: str) -> None:
    case = random_case(seed)
    size = case.size(layout, tile=4, slack=seed % 2)
    for rank in range(case.placement.num_ranks):
        plan = plan_tokens(*case.tensors(), rank, size, case.capacity, case.turns())
        check_plan(case, rank, plan)
        address = address_tokens(case.topk_idx[rank], plan)
        assert int((address.row >= 0).sum()) == int(case.kept[rank].sum())
        if layout == "packed":
            check_send_order(case, rank, plan, address.row)


@pytest.mark.parametrize("seed", range(12))
def test_packed_rows_come_back(seed: int) -> None:
    case = random_case(seed)
    check_packed(Cluster(case, case.size("packed", tile=4), width=6))


def test_rounding_of_a_fair_share() -> None:
    """Near whole numbers, where six decimals decide."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        slots = int(rng.integers(1, 5000))
        factor = float(rng.choice([1.0, 1.1, 1.2, 1.25, 1 / 3, 0.7, rng.random() + 0.5]))
        near = rng.integers(1, 10**6) * slots / factor
        assignments = max(round(near) + int(rng.integers(-1, 2)), 0)
        want = slot_capacity(factor, assignments, slots)
        assert device_capacity(factor, torch.tensor(assignments), slots).item() == want
    for factor in (1 + 4e-7, 1 + 5e-7, 1 + 6e-7, 1 - 1e-9, 0.5):
        want = slot_capacity(factor, 7, 7)
        assert device_capacity(factor, torch.tensor(7), 7).item() == want


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="'host'"):
        Capacity(1.0, 4, "host")
    with pytest.raises(ValueError, match=r"-1\.0"):
        Capacity(-1.0, 4)
    with pytest.raises(ValueError, match="100"):
        PlanSize(1, 100)
    with pytest.raises(ValueError, match="'loose'"):
        PlanSize(1, 128, layout="loose")
    with pytest.raises(ValueError, match="max_arrivals"):
        PlanSize(1, 128, layout="packed")
    with pytest.raises(ValueError, match="max_residents"):
        PlanSize(0, 128)
    case = random_case(1)
    counts, multiplicity, replicas = case.tensors()
    size = case.size("padded", 4)
    with pytest.raises(ValueError, match="multiplicity"):
        plan_tokens(counts, multiplicity.long(), replicas, 0, size)
    with pytest.raises(ValueError, match="counts"):
        plan_tokens(counts.int(), multiplicity, replicas, 0, size)
    with pytest.raises(ValueError, match="99"):
        plan_tokens(counts, multiplicity, replicas, 99, size)
    with pytest.raises(ValueError, match="offset 4"):
        move.peer_addresses([1024], torch.device("cpu"), 4)
    with pytest.raises(ValueError, match="together"):
        move.push_rows(torch.zeros(1, 1), None, torch.zeros(1), torch.zeros(1, 1))
