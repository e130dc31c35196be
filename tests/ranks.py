"""Running a function on several ranks, and a small Lightning job on them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook  # Lightning wants it: here, once for all ranks
from lightning.fabric.plugins.environments import ClusterEnvironment


class Ranks(ClusterEnvironment):
    """Tells Lightning about ranks that exist already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "unused"

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return dist.get_rank()


def run_ranks(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
    """``fn(*args)`` on every rank of a fresh gloo group; returns their results in rank order.

    Raises:
        RuntimeError: a rank raised (its traceback is the message) or did not end in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_work, args=(rank, num_ranks, folder, fn, args, timeout_s), daemon=True)
            for rank in range(num_ranks)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout_s)
        late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        if errors or late:
            raise RuntimeError("\n".join([*errors, f"ranks still running after {timeout_s} s: {late}"]))
        return [torch.load(f"{folder}/result-{rank}", weights_only=False) for rank in range(num_ranks)]


def _work(
    rank: int, num_ranks: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_s / 2),
        )
        dist.barrier()  # a rank that leaves at once breaks off those that still connect
        torch.save(fn(*args), f"{folder}/result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
