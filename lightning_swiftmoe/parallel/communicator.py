"""Exchanges between ranks that are started early and awaited late, counted in bytes and milliseconds.

Every exchange is an ``all_to_all_single`` with known splits. All ranks enter every exchange on every step, with zero
elements if need be, so the schedule of collectives does not depend on the data.

Shape suffixes: N ranks, E experts, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import is_capturing
from lightning_swiftmoe.parallel.traffic import TrafficMeter
from lightning_swiftmoe.parallel.watchdog import Watchdog

# torch 2.13 renamed it and deprecates the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

T = TypeVar("T")
U = TypeVar("U")


class ExchangeError(RuntimeError):
    """A collective failed; the message names phase, layer and rank, and the cause is chained."""


class Pending(Generic[T]):
    """An exchange on its way.

    Args:
        finish: waits, on the device where there is one, and returns the result.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None

    def wait(self) -> T:
        """The result. On a GPU the current stream waits, not the host. Waiting again is free."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result  # type: ignore[return-value]


class Communicator:
    """Collectives over one process group, on a GPU on a stream of their own.

    Tokens and expert state have a communicator each, so that neither waits for the other's order.

    Args:
        group: process group of the ranks that talk; None with a single rank.
        device: where this rank computes; tensors elsewhere are staged through it when the backend needs that.
        meter: counts what is sent; shared by the communicators of a rank.
        watchdog: watches exchanges on a GPU; None: nobody does.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        meter: TrafficMeter | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.group = group
        self.watchdog = watchdog
        self.device = torch.device(device)
        self.meter = meter or TrafficMeter()
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        # People know ranks of the job, not of a group.
        self._where = f"rank {dist.get_rank()} of {dist.get_world_size()}" if group is not None else "rank 0 of 1"
        self._backend = dist.get_backend(group) if group is not None else "none"
        self._stream = torch.cuda.Stream(self.device) if self._backend == "nccl" else None

    # -- started early, awaited late ---------------------------------------------------------------------------------

    def start(
        self,
        make: Callable[[], Tensor],
        send: Sequence[int],
        recv: Sequence[int],
        phase: str,
        layer: str,
        then: Callable[[Tensor], T],
    ) -> Pending[T]:
        """Start an all-to-all of ``make()`` and hand what arrives to ``then``.

        On a GPU all three run on this communicator's stream, behind what the current stream has been given so far.
        On a CPU ``make`` runs now and ``then`` in ``wait``.

        Args:
            make: gives the rows to send, ``[sum(send), ...]``, ordered by destination.
            send: ``N`` row counts.
            recv: ``N`` row counts; every rank derives them from the same plan, so they agree.
            phase: one of ``PHASES``.
            layer: for error messages.
            then: takes the ``[sum(recv), ...]`` rows, by source.

        Raises:
            ExchangeError: the collective failed or timed out, here or in ``wait``.
        """
        if self._stream is not None:
            return self._start_on_stream(make, send, recv, phase, layer, then)
        rows = make()
        if self.num_ranks == 1:
            return Pending(lambda: then(rows))
        arrived = rows.new_empty(sum(recv), *rows.shape[1:])
        self._count(rows, send, phase)
        with self.phase(phase, layer):
            work = dist.all_to_all_single(
                arrived, rows.contiguous(), list(recv), list(send), group=self.group, async_op=True
            )
        return Pending(lambda: then(self._awaited(work, arrived, phase, layer)))

    def launch(self, work: Callable[[], T], phase: str, layer: str, holding: Any = None) -> Pending[T]:
        """Start kernels that exchange by themselves on this communicator's stream, behind the current stream's work.

        Args:
            work: launches them; gives the result.
            phase: one of ``PHASES``.
            layer: for error messages.
            holding: what must not be freed before they are done.
        """

        def timed() -> T:
            with self.phase(phase, layer):
                return work()

        if self._stream is None:
            result = timed()
            return Pending(lambda: result)
        return self._run_on_stream(timed, [holding])

    def follow(self, pending: Pending[T], work: Callable[[T], U], holding: Any = None) -> Pending[U]:
        """Start ``work`` on what ``pending`` brings: on a GPU on this communicator's stream, on a CPU in ``wait``.

        Args:
            pending: of this communicator.
            work: gives the result.
            holding: what must not be freed before it is done.
        """
        if self._stream is None:
            return Pending(lambda: work(pending.wait()))
        return self._run_on_stream(lambda: work(pending.wait()), [holding])

    def all_to_all(self, rows: Tensor, send: Sequence[int], recv: Sequence[int], phase: str, layer: str) -> Tensor:
        """``start`` and ``wait`` in one: the ``[sum(recv), ...]`` rows that arrive, on the device of ``rows``."""
        if self.num_ranks == 1:
            return rows
        staged = self._staged(rows)
        arrived = staged.new_empty(sum(recv), *rows.shape[1:])
        self._count(rows, send, phase)
        with self.phase(phase, layer):
            dist.all_to_all_single(arrived, staged, list(recv), list(send), group=self.group)
        return arrived.to(rows.device)

    def move_rows(self, rows: Tensor, send: Sequence[int], recv: Sequence[int], phase: str, layer: str) -> Tensor:
        """``all_to_all``, differentiable once: the gradient of the rows travels back the same way."""
        return _MoveRows.apply(rows, self, list(send), list(recv), phase, layer)

    # -- small or rare exchanges -------------------------------------------------------------------------------------

    def gather_counts(self, counts: Tensor, layer: str) -> Tensor:
        """``[N, E]`` counts of all ranks from this rank's ``[E]``, on the device of ``counts``."""
        if self.num_ranks == 1:
            return counts[None]
        gathered = counts.new_empty(self.num_ranks, *counts.shape)
        self.meter.add("load", (self.num_ranks - 1) * counts.nbytes)
        with self.phase("load", layer):
            _all_gather(gathered.view(-1), counts.contiguous(), group=self.group)
        return gathered

    def largest(self, number: int, layer: str) -> int:
        """The largest of the ranks' numbers; the host waits for the other hosts."""
        return int(self.gather_counts(torch.tensor([number]), layer).max())

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
        self.meter.add(phase, receivers * shard.nbytes)
        with self.phase(phase, layer):
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
        self.meter.add(phase, tensor.nbytes * (self.num_ranks - 1) if self.rank == 0 else 0)
        with self.phase(phase, layer):
            dist.broadcast(staged, group=self.group, group_src=0)
        if staged is not tensor:
            tensor.copy_(staged)

    def add_up(self, tensor: Tensor, phase: str, layer: str) -> Tensor:
        """``tensor``, contiguous, overwritten with the sum over ranks, bit for bit the same on all of them.

        On a GPU the current stream does it and the host does not wait. Bytes count as those of a ring all-reduce: of
        ``b`` bytes, ``2 b (N - 1) / N`` leave every rank.
        """
        if self.num_ranks > 1:
            self.meter.add(phase, 2 * tensor.nbytes * (self.num_ranks - 1) // self.num_ranks)
            with self.phase(phase, layer):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    # -- inside ------------------------------------------------------------------------------------------------------

    def _start_on_stream(
        self,
        make: Callable[[], Tensor],
        send: Sequence[int],
        recv: Sequence[int],
        phase: str,
        layer: str,
        then: Callable[[Tensor], T],
    ) -> Pending[T]:
        def exchange() -> T:
            rows = make()
            arrived = rows.new_empty(sum(recv), *rows.shape[1:])
            self._count(rows, send, phase)
            with self.phase(phase, layer):
                dist.all_to_all_single(arrived, rows.contiguous(), list(recv), list(send), group=self.group)
            return then(arrived)

        return self._run_on_stream(exchange, [make, then])

    def _run_on_stream(self, work: Callable[[], T], held: list[Any]) -> Pending[T]:
        """``held`` is kept until the work is done: nobody else may have the memory that our stream is reading."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            result = work()
            done = torch.cuda.Event()
            done.record()

        def finish() -> T:
            torch.cuda.current_stream(self.device).wait_event(done)
            held.clear()
            return result

        return Pending(finish)

    def _awaited(self, work: Any, arrived: Tensor, phase: str, layer: str) -> Tensor:
        with self.phase(phase, layer):
            work.wait()
        return arrived

    def _count(self, rows: Tensor, send: Sequence[int], phase: str) -> None:
        row_bytes = rows[0:1].numel() * rows.element_size() if rows.shape[0] else 0
        self.meter.add(phase, (sum(send) - send[self.rank]) * row_bytes)

    def _staged(self, tensor: Tensor) -> Tensor:
        """Contiguous, and where the backend can reach it: NCCL moves device memory only."""
        return tensor.to(self.device).contiguous() if self._backend == "nccl" else tensor.contiguous()

    @contextmanager
    def phase(self, phase: str, layer: str) -> Iterator[None]:
        """Time and watch what happens inside, and give its errors a place.

        Raises:
            ExchangeError: something inside failed.
        """
        events = self._backend == "nccl"
        start = _event() if events else time.perf_counter()
        try:
            yield
        except Exception as error:
            where = f"{phase} exchange of layer {layer!r} on {self._where}"
            raise ExchangeError(
                f"{where} failed: {error}. If another rank raised an error first, that one is the cause; or it ran "
                "fewer forwards, as generate() does on some ranks without synced_gpus=True"
            ) from error
        if isinstance(start, torch.cuda.Event):
            end = _event()
            self.meter.add_events(phase, start, end)
            if self.watchdog is not None:
                self.watchdog.watch(phase, layer, end)
        else:
            self.meter.add(phase, seconds=time.perf_counter() - start)

    def watch(self, phase: str, layer: str) -> None:
        """What the current stream was given so far exchanges by itself: it ends in time, or this process does."""
        # What a user captures is not running, and the graph's replays are the user's to watch.
        if self.watchdog is not None and not is_capturing(self.device):
            done = torch.cuda.Event()
            done.record()
            self.watchdog.watch(phase, layer, done)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, communicator: Communicator, send: list[int], recv: list[int], phase: str, layer: str
    ) -> Tensor:
        ctx.args = communicator, recv, send, phase, layer
        arrived = communicator.all_to_all(rows, send, recv, phase, layer)
        return arrived.view_as(arrived) if arrived is rows else arrived

    @staticmethod
    @torch.autograd.function.once_differentiable  # autograd does not see what travels
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        communicator, send, recv, phase, layer = ctx.args
        return communicator.all_to_all(grad, send, recv, phase, layer), None, None, None, None, None
