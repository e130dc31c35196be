"""Ranks that stay alive over many tests: a process, and where there are GPUs a GPU, each.

Starting a process costs more than most cases, so the ranks take one function after the other.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

DEVICE = os.environ.get("SWIFTMOE_TEST_DEVICE", "cuda")  # "cpu" tries the harness itself, on gloo
NUM_RANKS = int(os.environ.get("SWIFTMOE_TEST_RANKS", "2"))  # of the tests that take several: 2, 3, 4, 6, 8

# The machines that the tests run on have no NVLink multicast.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}

_MOST_STARTS = 4  # where everything is broken, waiting again and again helps nobody


class RankPool:
    """``num_ranks`` ranks of one process group, started by the first call and anew after a failure.

    Args:
        num_ranks: ranks.
        device: ``"cuda"``: NCCL, rank ``r`` on GPU ``r``; ``"cpu"``: gloo.
    """

    def __init__(self, num_ranks: int, device: str = DEVICE) -> None:
        self.num_ranks = num_ranks
        self.device = device
        self._starts = 0
        self._folder = ""
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 100) -> list[Any]:
        """``fn(*args)`` on every rank; their results in rank order. Both travel by pickle.

        Raises:
            RuntimeError: a rank raised (its traceback is in the message), died, or did not answer in time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        answers = self._collect(timeout_s)
        errors = [error for error, _ in answers if error]
        if errors:
            self.stop()
            raise RuntimeError("\n".join(errors))
        return [result for _, result in answers]

    def stop(self) -> None:
        """End the ranks, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._starts += 1
        if self._starts > _MOST_STARTS:
            raise RuntimeError(f"{self.num_ranks} rank(s) broke {_MOST_STARTS} times already: not started again")
        self._folder = tempfile.mkdtemp()
        # CUDA does not outlive a fork; on the host a fork saves every rank its imports.
        context = multiprocessing.get_context("spawn" if self.device == "cuda" else "fork")
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            args = (rank, self.num_ranks, self.device, self._folder, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout_s: float) -> list[tuple[str, Any]]:
        """An error or a result from every rank."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < self.num_ranks and (left := deadline - time.monotonic()) > 0:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, left):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = self._receive(rank)
                if answers[rank][0]:
                    # The others may wait for this one; what they say soon is all that is of interest.
                    deadline = min(deadline, time.monotonic() + 5)
        late = (f"no answer after {timeout_s} s, or after the failure of another rank", None)
        return [
            (f"rank {rank}: {error}" if error else "", result)
            for rank in range(self.num_ranks)
            for error, result in [answers.get(rank, late)]
        ]

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            return torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
        except EOFError:
            self._processes[rank].join(1)
            return f"died with exit code {self._processes[rank].exitcode}", None


def _serve(rank: int, num_ranks: int, device: str, folder: str, pipe: Connection) -> None:
    os.environ.update(NO_MULTICAST)
    torch.set_num_threads(1)
    _join(rank, num_ranks, device, folder)
    while True:
        fn, args = pipe.recv()
        try:
            answer = "", fn(*args)
        except BaseException:
            answer = traceback.format_exc(), None
        packed = io.BytesIO()
        torch.save(answer, packed)
        pipe.send_bytes(packed.getvalue())


def _join(rank: int, num_ranks: int, device: str, folder: str) -> None:
    gpu = torch.device("cuda", rank) if device == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=60),
        device_id=gpu,
    )
