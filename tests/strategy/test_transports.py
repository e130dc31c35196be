"""Asking for a transport that ranks do not have: one sentence that says what is missing and what works."""

import pytest
import torch.distributed as dist

from lightning_swiftmoe import SwiftMoEStrategy
from lightning_swiftmoe.parallel import transports
from lightning_swiftmoe.parallel.communicator import Communicator
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
