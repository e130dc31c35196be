"""Experts lent through peers' memory: loops over loans against numbers, the kernels in the interpreter and on a GPU."""

import pytest
import torch

from lightning_swiftmoe.kernels.shards.lent_experts import (
    Loans,
    collect_gradients_reference,
    fetch_experts_reference,
    offer_gradients_reference,
)
from tests.interpreter import run_interpreted

# Rank 0 has experts 0 and 2, ranks 1 and 2 have expert 1. Both of them borrow expert 2 from rank 0.
MULTIPLICITY = torch.tensor([[1, 0, 2], [0, 3, 0], [0, 3, 0]], dtype=torch.int32)
COPIES = torch.tensor([[-1], [2], [2]], dtype=torch.int32)
LENDERS = torch.tensor([[-1], [0], [0]], dtype=torch.int32)


def loans(rank: int) -> Loans:
    return Loans(COPIES, LENDERS, MULTIPLICITY, rank)


def test_a_borrower_has_the_hosts_weights() -> None:
    held = [torch.tensor([[10.0], [12.0], [0.0]]), torch.tensor([[11.0], [0.0], [0.0]]), torch.full((3, 1), -1.0)]
    for rank in range(3):
        fetch_experts_reference(loans(rank), held)
    assert held[0].flatten().tolist() == [10, 12, 0]
    assert held[1].flatten().tolist() == [11, 0, 12]
    assert held[2].flatten().tolist() == [-1, -1, 12]


def test_the_host_adds_up_what_borrowers_have() -> None:
    grads = [
        torch.tensor([[1.0], [2.0], [9.0]]),
        torch.tensor([[3.0], [0.0], [40.0]]),
        torch.tensor([[4.0], [0], [50]]),
    ]
    offered = [torch.full((1, 1), 7.0) for _ in range(3)]
    for rank in range(3):
        offer_gradients_reference(loans(rank), grads[rank], offered[rank])
    assert [offer.item() for offer in offered] == [7, 40, 50]
    for rank in range(3):
        collect_gradients_reference(loans(rank), grads[rank], offered)
    assert grads[0].flatten().tolist() == [1, 92, 9]
    assert grads[1].flatten().tolist() == [3, 0, 40]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert run_interpreted("tests.kernels.lent_experts_interpreted") == "ok\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(10))
def test_kernels_on_a_gpu(seed: int) -> None:
    from tests.kernels.lent_experts_cases import check

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check(seed, dtype, torch.device("cuda"), size=[8, 24, 1048, 2048, 2112 * 320][seed % 5])
