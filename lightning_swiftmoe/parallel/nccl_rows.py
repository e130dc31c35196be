"""Rows by all-to-all: the plan is made on the device, and the host reads how many rows go where, once a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import tile_rows
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout
from lightning_swiftmoe.kernels.indirect import Indirect
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.move import clear_padding, pack_rows, unpack_rows
from lightning_swiftmoe.kernels.token_dispatch.token_plan import PlanSize, TokenPlan
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.row_exchange import (
    OfTokens,
    PlacementTables,
    Routed,
    RowExchange,
    RowTrip,
    TokenBound,
)


class NcclRows(RowExchange):
    """Trips by ``all_to_all_single``.

    Args:
        communicator: for tokens.
        bound: of the assignments of a rank.
    """

    def __init__(self, communicator: Communicator, bound: TokenBound) -> None:
        self.communicator = communicator
        self.bound = bound

    def plan(self, routed: Routed, tables: PlacementTables, name: str, *, training: bool) -> NcclTrip:
        """See ``RowExchange.plan``."""
        gathered = self.communicator.gather_counts(routed.counts, name)
        tile = tile_rows(routed.topk_idx.device)
        # How many tokens other ranks have is not known yet, so arrays of integers have room for the most they can be.
        most = self.communicator.num_ranks * self.bound.of(routed.topk_idx.numel(), name)
        rows = tables.max_rows(most, tile)
        size = PlanSize(tables.max_residents, rows, tile, "packed", most)
        plan = tables.plan(gathered, self.communicator.rank, size)
        splits = _HostSplits(plan)
        address = address_tokens(routed.topk_idx, plan)
        return NcclTrip(self.communicator, plan, address, splits, gathered, routed.dtype, name)


class _HostSplits:
    """Rows to send and to receive by rank, on their way to the host."""

    def __init__(self, plan: TokenPlan) -> None:
        both = torch.stack([plan.send_rows, plan.recv_rows])
        self._event: torch.cuda.Event | None = None
        self._host = both
        if both.device.type == "cuda":
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[list[int], list[int]]:
        """The one wait of a layer's forward."""
        if self._event is not None:
            self._event.synchronize()
        send, recv = self._host.tolist()
        return send, recv


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Known once the splits are."""

    send: list[int]
    recv: list[int]
    rows: int  # P


class NcclTrip(RowTrip):
    """Rows are packed by host, travel, and are laid out by resident where they arrive."""

    def __init__(
        self,
        communicator: Communicator,
        plan: TokenPlan,
        address: Address,
        splits: _HostSplits,
        counts: Tensor,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.dtype = dtype
        self._communicator = communicator
        self._plan = plan
        self._address = address
        self._name = name
        self.counts = counts
        self.rank_load = plan.rank_load
        send, recv = splits.wait()
        tile = plan.size.tile
        rows = sum(recv) + plan.size.max_residents * (tile - 1)
        rows = min(-(-max(rows, 1) // tile) * tile, plan.size.max_rows)
        self._sizes = _Sizes(send, recv, rows)
        order = plan.order[:rows]
        own = torch.arange(rows, dtype=torch.int32, device=order.device)
        in_place = torch.where(order >= 0, own, -1)
        self.layout = RowLayout(plan.starts, plan.ends, in_place, plan.tile_expert[: rows // tile], plan.num_rows, tile)
        inverse = plan.inverse[: sum(recv)].view(-1, 1)
        self._arrival = Address(torch.zeros_like(inverse), inverse)

    def to_hosts(self, tokens_TD: OfTokens, weights_TK: OfTokens) -> tuple[Tensor, Tensor]:
        """See ``RowTrip``."""
        assert isinstance(weights_TK, Tensor)
        return self._rows_to_hosts(tokens_TD), self._weights_to_hosts(weights_TK)

    def gradients_to_hosts(self, grads_TD: OfTokens, tokens_TD: OfTokens | None = None) -> tuple[Tensor, Tensor | None]:
        """See ``RowTrip``."""
        return self._rows_to_hosts(grads_TD), None if tokens_TD is None else self._rows_to_hosts(tokens_TD)

    def offer(self, rows_PD: Tensor, scalars_P: Tensor | None = None) -> None:
        """See ``RowTrip``: they are sent by ``to_tokens``."""

    def to_tokens(self, rows_PD: Tensor, out_TD: OfTokens, weights_TK: OfTokens | None = None) -> None:
        """See ``RowTrip``."""
        assert isinstance(out_TD, Tensor)
        assert not isinstance(weights_TK, Indirect)
        leaving = rows_PD.new_empty(sum(self._sizes.recv), rows_PD.shape[1])
        unpack_rows(rows_PD, self._arrival, None, leaving)
        back = self._communicator.all_to_all(leaving, self._sizes.recv, self._sizes.send, "combine", self._name)
        unpack_rows(back, self._address, weights_TK, out_TD)

    def scalars_to_tokens(self, scalars_P: Tensor, out_TK: OfTokens) -> None:
        """See ``RowTrip``."""
        assert isinstance(out_TK, Tensor)
        leaving = scalars_P[self._arrival.row.flatten().long()]
        back = self._communicator.all_to_all(leaving, self._sizes.recv, self._sizes.send, "combine", self._name)
        row = self._address.row.long()
        # Dropped assignments read a zero behind the last.
        padded = torch.nn.functional.pad(back, (0, 1))
        out_TK.copy_(padded[torch.where(row >= 0, row, back.numel())])

    def result_buffer(self, like_PD: Tensor) -> Tensor | None:
        """See ``RowTrip``: rows are packed on their way anyway."""
        return None

    def _rows_to_hosts(self, tokens_TD: OfTokens) -> Tensor:
        assert isinstance(tokens_TD, Tensor)
        packed = pack_rows(tokens_TD, self._address, sum(self._sizes.send), self.dtype)
        arrived = self._communicator.all_to_all(packed, self._sizes.send, self._sizes.recv, "dispatch", self._name)
        rows = pack_rows(arrived, self._arrival, self._sizes.rows)
        clear_padding(rows, self._plan.starts, self._plan.ends)
        return rows

    def _weights_to_hosts(self, weights_TK: Tensor) -> Tensor:
        numbers = weights_TK.flatten().to(torch.promote_types(weights_TK.dtype, torch.float32))
        packed = _scattered(numbers, self._address.row, sum(self._sizes.send))
        arrived = self._communicator.all_to_all(packed, self._sizes.send, self._sizes.recv, "dispatch", self._name)
        return _scattered(arrived, self._arrival.row, self._sizes.rows)


def _scattered(numbers: Tensor, rows: Tensor, size: int) -> Tensor:
    """``out[rows[i]] = numbers[i]``, zero elsewhere; negative rows are left out."""
    row = rows.flatten().long()
    out = numbers.new_zeros(size + 1)
    out[torch.where(row >= 0, row, size)] = numbers
    return out[:-1]
