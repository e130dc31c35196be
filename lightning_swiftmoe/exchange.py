"""The one place where expert weights, gradients and tokens move between ranks, counted in bytes and milliseconds.

Every exchange is an ``all_to_all_single`` of rows with known splits. All ranks enter every exchange on every step, with
zero rows if need be, so the schedule of collectives does not depend on the data.

Shape suffixes: N ranks, E experts, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed it and deprecates the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PHASES = ("load", "dispatch", "combine", "gradient", "migration", "weight", "setup", "checkpoint")


@dataclass
class Traffic:
    """What one rank moved in one phase.

    Args:
        sent_bytes: bytes sent to other ranks.
        seconds: time spent in the exchanges, as this process saw it.
    """

    sent_bytes: int = 0
    seconds: float = 0.0


class ExchangeError(RuntimeError):
    """A collective failed; the message names phase, layer and rank, and the cause is chained."""


class Exchange:
    """Collectives over the ranks of one process group.

    Args:
        group: process group over all ranks; None with a single rank and no initialised group.
        device: where this rank computes; tensors elsewhere are staged through it when the backend needs that.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, torch.device(device)
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        self._backend = dist.get_backend(group) if group is not None else "none"
        self._traffic = {phase: Traffic() for phase in PHASES}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def pop_traffic(self) -> dict[str, Traffic]:
        """Traffic by phase since the last call. On a GPU this waits for the exchanges to finish."""
        for phase, start, end in self._events:
            end.synchronize()
            self._traffic[phase].seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        traffic, self._traffic = self._traffic, {phase: Traffic() for phase in PHASES}
        return traffic

    def move_rows(self, rows: Tensor, send: Sequence[int], recv: Sequence[int], phase: str, layer: str) -> Tensor:
        """Send ``send[j]`` rows to each rank ``j``; return the ``recv[j]`` rows from each, in rank order.

        Differentiable: the gradient of the rows travels back the same way.

        Args:
            rows: ``[sum(send), ...]``, ordered by destination.
            send: ``N`` row counts.
            recv: ``N`` row counts; every rank derives them from the same plan, so they agree.
            phase: one of ``PHASES``.
            layer: for error messages.

        Raises:
            ExchangeError: the collective failed or timed out.
        """
        return _MoveRows.apply(rows, self, list(send), list(recv), phase, layer)

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        """``[N, E]`` counts of all ranks from this rank's ``[E]``, on the device of ``counts``."""
        if self.num_ranks == 1:
            return counts[None]
        gathered = counts.new_empty(self.num_ranks, *counts.shape)
        with self._phase("load", layer, (self.num_ranks - 1) * counts.nbytes):
            _all_gather(gathered.view(-1), counts.contiguous(), group=self.group)
        return gathered

    def gather_shards(self, shard: Tensor, phase: str, layer: str, to: int | None = None) -> Tensor | None:
        """``[N, ...]`` shards of all ranks, on the device of ``shard``.

        Args:
            shard: the same shape on every rank.
            phase: one of ``PHASES``.
            layer: for error messages.
            to: only this rank receives, the others get None; None: every rank does.
        """
        if self.num_ranks == 1:
            return shard[None].clone()
        local = self._staged(shard)
        receives = to is None or to == self.rank
        gathered = local.new_empty(self.num_ranks, *shard.shape) if receives else None
        receivers = self.num_ranks - 1 if to is None else int(to != self.rank)
        with self._phase(phase, layer, receivers * shard.nbytes):
            if to is not None:
                parts = list(gathered.unbind(0)) if gathered is not None else None
                dist.gather(local, parts, group=self.group, group_dst=to)
            elif gathered is not None:
                _all_gather(gathered.view(-1), local.view(-1), group=self.group)
        return None if gathered is None else gathered.to(shard.device)

    def broadcast(self, tensor: Tensor, phase: str, layer: str) -> None:
        """Overwrite ``tensor`` with rank 0's, in place."""
        if self.num_ranks == 1:
            return
        staged = self._staged(tensor)
        with self._phase(phase, layer, tensor.nbytes * (self.num_ranks - 1) if self.rank == 0 else 0):
            dist.broadcast(staged, group=self.group, group_src=0)
        if staged is not tensor:
            tensor.copy_(staged)

    def sum_scalar(self, value: Tensor, layer: str) -> Tensor:
        """The sum of a scalar over ranks."""
        if self.num_ranks == 1:
            return value
        staged = self._staged(value).clone()
        with self._phase("gradient", layer, 0):
            dist.all_reduce(staged, group=self.group)
        return staged.to(value.device)

    def all_to_all(self, rows: Tensor, send: list[int], recv: list[int], phase: str, layer: str) -> Tensor:
        """``move_rows`` without a gradient."""
        if self.num_ranks == 1:
            return rows
        staged = self._staged(rows)
        arrived = staged.new_empty(sum(recv), *rows.shape[1:])
        row_bytes = rows[0:1].numel() * rows.element_size() if rows.shape[0] else 0
        with self._phase(phase, layer, (sum(send) - send[self.rank]) * row_bytes):
            dist.all_to_all_single(arrived, staged, recv, send, group=self.group)
        return arrived.to(rows.device)

    def _staged(self, tensor: Tensor) -> Tensor:
        """Contiguous, and where the backend can reach it: NCCL moves device memory only."""
        return tensor.to(self.device).contiguous() if self._backend == "nccl" else tensor.contiguous()

    @contextmanager
    def _phase(self, phase: str, layer: str, sent_bytes: int) -> Iterator[None]:
        self._traffic[phase].sent_bytes += sent_bytes
        events = self._backend == "nccl"
        start = _event() if events else time.perf_counter()
        try:
            yield
        except Exception as error:
            where = f"{phase} exchange of layer {layer!r} on rank {self.rank} of {self.num_ranks}"
            raise ExchangeError(
                f"{where} failed: {error}. If another rank raised an error first, that one is the cause."
            ) from error
        if isinstance(start, torch.cuda.Event):
            self._events.append((phase, start, _event()))
        else:
            self._traffic[phase].seconds += time.perf_counter() - start


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: Exchange, send: list[int], recv: list[int], phase: str, layer: str
    ) -> Tensor:
        ctx.args = exchange, recv, send, phase, layer
        arrived = exchange.all_to_all(rows, send, recv, phase, layer)
        return arrived.view_as(arrived) if arrived is rows else arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        exchange, send, recv, phase, layer = ctx.args
        return exchange.all_to_all(grad, send, recv, phase, layer), None, None, None, None, None
