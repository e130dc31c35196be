"""A thread copies to the host while the main thread waits in the driver."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_swiftmoe.kernels.to_host import to_host
from lightning_swiftmoe.parallel import copies_aside
from lightning_swiftmoe.parallel.copies_aside import CopiesAside

pytestmark = pytest.mark.gpu

WAIT_S = 3.0
CYCLES_PER_S = 1.5e9


@pytest.fixture
def values():
    """More than one piece, of which the last is not whole."""
    return torch.randn(3, 10_000_001, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("waits", [torch.Tensor.item, to_host, lambda one: torch.cuda.synchronize()])
def test_while_another_thread_waits(values, waits):
    aside = CopiesAside(values.device)
    one = torch.ones((), device="cuda")
    expected = [values.cpu(), torch.tensor(1.0)]
    over = threading.Event()
    seconds = []

    def copy():
        while not over.is_set():
            began = time.monotonic()
            found = [aside.to_host(values), aside.to_host(one)]
            seconds.append(time.monotonic() - began)
            assert all(map(torch.equal, found, expected))

    torch.cuda._sleep(int(WAIT_S * CYCLES_PER_S))
    with ThreadPoolExecutor(1) as pool:
        copied = pool.submit(copy)
        waits(one)
        over.set()
        copied.result()
    assert len(seconds) > 2
    assert max(seconds) < WAIT_S / 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_while_another_thread_copies_to_pageable_memory(values, monkeypatch):
    """The driver lets no thread do anything meanwhile, and who asks hears of it."""
    monkeypatch.setattr(copies_aside, "_STUCK_S", WAIT_S / 10)
    aside = CopiesAside(values.device)
    one = torch.ones((), device="cuda")
    asked, over = [], threading.Event()

    def ask():
        while not over.wait(0.01):
            asked.append(aside.is_stuck)

    def copy():
        while not over.is_set():
            aside.to_host(one)

    torch.cuda._sleep(int(WAIT_S * CYCLES_PER_S))
    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(ask), pool.submit(copy)]
        one.cpu()
        over.set()
        for thread in threads:
            thread.result()
    assert any(asked)
    assert not aside.is_stuck
