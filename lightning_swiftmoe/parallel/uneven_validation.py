"""Ranks that have run out of validation batches serve the experts they hold to ranks that have more.

A rank needs the experts of all others for every batch. So all ranks tell each other, on their hosts, what they are
about to do: at the head of a batch always, and in a batch that some rank lacks at the head of every layer too. Who
lacks it runs that layer's exchange without tokens of its own. torch's ``Join`` does the same for whole iterations,
whose exchanges it must know beforehand; here the ranks that have the batch name each. DDP is no party to it: without
gradients it shares buffers in the first forward only, which every rank runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import torch
from torch import Tensor

from lightning_swiftmoe.layers.layer import MoELayer
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.token_dispatcher import compute_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Kind(IntEnum):
    """What a rank is about to do."""

    BATCH = 0
    LAYER = 1
    LOADER_ENDS = 2
    VALIDATION_ENDS = 3


@dataclass(frozen=True)
class Turn:
    """What a rank tells the others.

    Args:
        kind: a ``Kind``.
        first: the loader's number; of a layer its place among all.
        second: the batch's number in it, or how many there were; of a layer what its tokens are made of.
        third: how many batches the loader has, infinity where that is unknown; of a layer what it computes with.
    """

    kind: float
    first: float = 0
    second: float = 0
    third: float = 0


class UnevenValidation:
    """Keeps the ranks of a job together while they validate.

    Args:
        moes: every MoE layer by name, in the same order on all ranks.
        device: of their tokens.
        control: all ranks, on their hosts.
        begin_batch: what a rank without a batch does at its head, together with those that have it.
        everybody_runs: ranks share more than experts: one that lacks a batch could not serve the others.
    """

    def __init__(
        self,
        moes: Mapping[str, MoELayer],
        device: torch.device,
        control: Communicator,
        begin_batch: Callable[[], None],
        *,
        everybody_runs: bool = False,
    ) -> None:
        self._moes = dict(moes)
        self._names = list(moes)
        self._device = device
        self._control = control
        self._begin_batch = begin_batch
        self._everybody_runs = everybody_runs
        self._loader = 0
        self._seen = 0
        self._somebody_lacks = False

    def batch(self, loader: int, number: int, batches: float) -> None:
        """This rank has a batch. The hosts wait for each other.

        Args:
            loader: of which loader.
            number: in that loader, from 0.
            batches: how many the loader has; infinity where that is unknown.

        Raises:
            ValueError: some rank has no batch at all of that loader.
        """
        self._loader, self._seen = loader, number + 1
        turns = self._told(Turn(Kind.BATCH, loader, number, batches))
        self._somebody_lacks = any(turn.kind != Kind.BATCH for turn in turns)

    def layer(self, name: str, x: Tensor) -> None:
        """This rank is about to send the tokens ``x`` to experts of the layer; tells nobody where all ranks do so."""
        if self._somebody_lacks:
            dtypes = [_DTYPES.index(dtype) for dtype in (x.dtype, compute_dtype(x))]
            self._told(Turn(Kind.LAYER, self._names.index(name), *dtypes))

    def loader_ends(self) -> None:
        """This rank has no more batches of the loader: serve those that have, until none has.

        Raises:
            ValueError: this rank had none.
        """
        mine = Turn(Kind.LOADER_ENDS, self._loader, self._seen)
        self._somebody_lacks = False
        while True:
            turn = min(self._told(mine), key=lambda turn: turn.kind)
            if turn.kind == Kind.LOADER_ENDS:
                break
            if turn.kind == Kind.BATCH:
                self._begin_batch()
            else:
                self._serve(int(turn.first), _DTYPES[int(turn.second)], _DTYPES[int(turn.third)])
        self._loader, self._seen = self._loader + 1, 0

    def validation_ends(self) -> None:
        """This rank has no more loaders, or never had one.

        Raises:
            ValueError: another rank has.
        """
        self._told(Turn(Kind.VALIDATION_ENDS))
        self._loader, self._seen = 0, 0

    def _told(self, mine: Turn) -> list[Turn]:
        """What every rank is about to do.

        Raises:
            ValueError: they cannot do so together.
        """
        told = torch.tensor(astuple(mine), dtype=torch.float64)
        turns = [Turn(*values) for values in self._control.gather_counts(told, "validation batch").tolist()]
        check_turns(turns)
        if self._everybody_runs and {turn.kind for turn in turns} > {Kind.BATCH}:
            lacking = [rank for rank, turn in enumerate(turns) if turn.kind != Kind.BATCH]
            raise ValueError(
                f"rank(s) {lacking} have no more validation batches and others have, but with dense='fsdp2' every rank "
                "runs every batch: give all ranks the same number"
            )
        return turns

    def _serve(self, number: int, dtype: torch.dtype, computes_in: torch.dtype) -> None:
        moe = self._moes[self._names[number]]
        x = torch.empty(0, moe.hidden_size, dtype=dtype, device=self._device)
        with torch.autocast(self._device.type, dtype=computes_in, enabled=computes_in != dtype):
            moe.serve(x)


def check_turns(turns: Sequence[Turn]) -> None:
    """Raise a ValueError where ranks are about to do what they cannot do together."""
    kinds = {turn.kind for turn in turns}
    if Kind.LAYER in kinds:
        layers = {turn for turn in turns if turn.kind == Kind.LAYER}
        if len(layers) > 1 or kinds - {Kind.LAYER, Kind.LOADER_ENDS}:
            raise ValueError(
                "in a validation batch that some ranks lack, the others came to different MoE layers or dtypes: run "
                "the same layers in every validation_step, or give all ranks the same number of batches"
            )
    elif Kind.BATCH in kinds:
        _check_batch(min((turn for turn in turns if turn.kind == Kind.BATCH), key=astuple), turns)
    elif len({(turn.kind, turn.first) for turn in turns}) > 1:
        raise ValueError(
            "some ranks ended a validation loader that others do not have: give all ranks the same loaders"
        )


def _check_batch(first: Turn, turns: Sequence[Turn]) -> None:
    """Whoever lacks the batch has had one of this loader before: metrics of all ranks come together at its end."""
    lacking = [rank for rank, turn in enumerate(turns) if not _takes_part(turn, first)]
    if not lacking:
        return
    has, most = min((rank, turn.third) for rank, turn in enumerate(turns) if _is_same_batch(turn, first))
    more = f"more than {first.second:.0f}" if math.isinf(most) else f"{most:.0f}"
    raise ValueError(
        f"validation loader {first.first:.0f} has {first.second:.0f} batch(es) on rank(s) {lacking} and {more} on rank "
        f"{has}: every rank needs at least one of every loader, since metrics of all ranks come together at its end"
    )


def _is_same_batch(turn: Turn, first: Turn) -> bool:
    return (turn.kind, turn.first, turn.second) == (first.kind, first.first, first.second)


def _takes_part(turn: Turn, first: Turn) -> bool:
    has_served_before = turn.kind == Kind.LOADER_ENDS and turn.first == first.first and turn.second > 0
    return _is_same_batch(turn, first) or has_served_before
