"""Asking for a transport that ranks do not have: one sentence that says what is missing and what works."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.parallel import transports
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.mesh import Groups
from tests.jobs import Job, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_an_unknown_name_is_refused_at_construction():
    with pytest.raises(ValueError, match="transport must be one of auto, gloo, nccl, symmetric, got 'infiniband'"):
        SwiftMoEStrategy(transport="infiniband")


def fit_with(transport):
    try:
        train(Job(slots=3, steps=1, strategy={"transport": transport}))
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("transport", ["nccl", "symmetric"])
def test_ranks_without_gpus_name_gloo(transport):
    sentence = (
        f"transport={transport!r} is not available here: there is no NCCL process group of GPUs on every rank; "
        "transport='gloo' works"
    )
    assert run_ranks(2, fit_with, transport) == [sentence, sentence]


@pytest.mark.parametrize("transport", ["gloo", "auto"])
def test_ranks_without_gpus_train_with_gloo(transport):
    assert run_ranks(2, fit_with, transport) == ["trained", "trained"]


def choose(wanted, gpu_of_rank, reach_of_rank):
    """With GPUs that only seem to be there."""
    rank = dist.get_rank()
    kind = "cuda" if gpu_of_rank[rank] else "cpu"
    dist_backend, dist.get_backend = dist.get_backend, lambda *_: "nccl"
    transports._reaches_all_peers = lambda *_: reach_of_rank[rank]
    control = Communicator.__new__(Communicator)
    control.largest = lambda number, _: max(_gather(number))
    try:
        return transports.choose_transport(wanted, transports.torch.device(kind), control, control)
    except ValueError as error:
        return str(error)
    finally:
        dist.get_backend = dist_backend


def _gather(number):
    numbers = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return numbers


def choose_on_two_nodes(size):
    """Two nodes of two GPUs that only seem to be there."""
    node, gpu = divmod(dist.get_rank(), 2)
    everybody, group = Communicator(dist.group.WORLD), Communicator(Groups.of(size, timedelta(seconds=30)).experts)
    dist_backend, dist.get_backend = dist.get_backend, lambda *_: "nccl"
    transports._host_number = lambda: node
    cuda = transports.torch.cuda
    cuda.device_count, cuda.can_device_access_peer = lambda: 2, lambda here, there: here != there
    try:
        return transports.choose_transport("auto", transports.torch.device("cuda", gpu), group, everybody)
    finally:
        dist.get_backend = dist_backend


@pytest.mark.parametrize(("size", "chosen"), [(4, "nccl"), (2, "symmetric")])
def test_groups_inside_a_node_reach_each_others_memory(size, chosen):
    assert run_ranks(4, choose_on_two_nodes, size) == [chosen] * 4


@pytest.mark.parametrize(
    ("wanted", "gpus", "reach", "chosen"),
    [
        ("auto", [True, True], [True, True], "symmetric"),
        ("auto", [True, True], [True, False], "nccl"),
        ("auto", [True, False], [True, False], "gloo"),
        ("nccl", [True, True], [True, True], "nccl"),
        (
            "symmetric",
            [True, True],
            [False, True],
            "transport='symmetric' is not available here: ranks cannot reach each other's memory; "
            "transport='nccl' works",
        ),
    ],
)
def test_all_ranks_choose_what_all_of_them_have(wanted, gpus, reach, chosen):
    assert run_ranks(2, choose, wanted, gpus, reach) == [chosen, chosen]
