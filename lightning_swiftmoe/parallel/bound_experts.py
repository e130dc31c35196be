"""Optimizer state bound to the hosts of an expert, as DeepSpeed and FlexMoE keep it: the baselines, for real.

An expert's state is cut evenly over the ranks that host it (``BoundShards``). Gradients and weights travel among those
hosts only; but when the placement gives an expert other hosts, its masters and moments must follow, and that is what
makes moving an expert expensive. This rank's shard of a parameter is flat, ``[n]``: its pieces by expert, one after the
other. Contents and length change with the owners; the Parameter in the user's optimizer stays the same object.

Shape suffixes: N ranks, E experts, R residents of this rank, P elements of one expert's parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.parallel.communicator import Pending
from lightning_swiftmoe.parallel.expert_tensor import local_part, replace_local
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts, Locals
from lightning_swiftmoe.placement import Placement
from lightning_swiftmoe.placement.bound_shards import BoundShards, Piece
from lightning_swiftmoe.placement.transfer import Transfer, changed_experts, transfer_plan

KeyedPieces = list[tuple[str, Piece]]


class BoundExperts(HostedExperts):
    """Bound state: shards have other elements and another length ``n`` whenever experts change hosts."""

    cuts: dict[str, BoundShards]

    @torch.no_grad()
    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Masters, and state with a number for each of their elements, go to the hosts under ``placement``.

        Scalar state stays as it is; gradients are dropped, their step is over. Where no expert changes hosts nothing is
        sent, which every rank knows from the placements.
        """
        if self.mesh is None or not changed_experts(self.placement, placement):
            return
        # Checked for all before anything changes.
        names = {key: self._elementwise(key, states.get(param, {})) for key, param in self.parameters.items()}
        moves = []
        for key, param in self.parameters.items():
            here = self.cuts[key]
            there = self.cuts[key] = BoundShards(here.num_elements, placement)
            plan = transfer_plan(here, there, range(here.num_experts))
            state = states.get(param, {})
            held = [self.local(key).flatten(), *(local_part(state[name]).flatten() for name in names[key])]
            moved = [self.pinned(old.new_empty(there.size(self.communicator.rank))) for old in held]
            moves += [_Move(old, new, here, there, plan) for old, new in zip(held, moved, strict=True)]
            param.grad = None
            weights, *moments = (self._as_shard(key, new) for new in moved)
            replace_local(param, weights)
            state.update({name: self.wrapped(key, new) for name, new in zip(names[key], moments, strict=True)})
        self._migrate(moves)

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, rows, ...]`` tensor that has ``shard`` on this rank; None where not received."""
        if self.mesh is None:
            return shard.detach().clone()
        cut = self.cuts[key]
        flat = shard.detach().flatten()
        longest = max(cut.size(rank) for rank in self._ranks)
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        gathered = self.communicator.gather_shards(padded, phase, self.name, to)
        if gathered is None:
            return None
        full = gathered.new_empty(cut.num_experts, cut.num_elements)
        for rank in self._ranks:
            for piece in cut.pieces(rank).values():
                full[piece.expert, piece.start : piece.stop] = gathered[rank, piece.here]
        return full.view(self.shapes[key])

    def part(self, key: str, canonical: Tensor) -> Tensor:
        """``[1, n, 1]`` of a canonical tensor, ``[1, n]`` of a bias; with one rank all of it."""
        if self.mesh is None:
            return canonical
        rows = canonical.reshape(self.placement.num_experts, -1)
        pieces = self.cuts[key].pieces(self.communicator.rank).values()
        flat = torch.cat([rows[0, :0], *(rows[piece.expert, piece.start : piece.stop] for piece in pieces)])
        return self._as_shard(key, flat)

    def _as_shard(self, key: str, flat: Tensor) -> Tensor:
        """``flat [n]`` with as many dims as the canonical tensor has."""
        return flat.view(1, -1, *[1] * (len(self.shapes[key]) - 2))

    # -- gradients to the owners, weights back: the same pieces both ways -------------------------------------------

    def _make_cut(self, shape: torch.Size) -> BoundShards:
        return BoundShards(shape[1:].numel(), self.placement)

    def _start_gradients(self, grads: Locals) -> Pending[Locals]:
        totals = self._reduced_gradients(grads)
        return Pending(lambda: totals)

    def _reduced_gradients(self, grads: Locals) -> Locals:
        keys = list(grads)
        rows = {key: self._by_expert(grad) for key, grad in grads.items()}
        sent = [[rows[key][p.expert][p.start : p.stop] for key, p in pieces] for pieces in self._pieces_here(keys)]
        mine = self._pieces_of_mine(keys)
        dtype = _widest(grad.dtype for grad in grads.values())
        blocks = self._swap(sent, [_num_elements(pieces) for pieces in mine], "gradient", dtype)
        # Rank by rank: a fixed order of adding, in the shards' precision.
        device = self.communicator.device
        totals = {key: torch.zeros_like(self.local(key), device=device).flatten() for key in keys}
        for pieces, block in zip(mine, blocks, strict=True):
            targets = [totals[key][p.here] for key, p in pieces]
            if targets:
                torch._foreach_add_(targets, list(block.split([p.num_elements for _, p in pieces])))
        return {
            key: self._as_shard(key, (total / self.num_sharers).to(self.state_device)) for key, total in totals.items()
        }

    def _start_weights(self) -> Pending[None]:
        self._send_weights()
        return Pending(lambda: None)

    @torch.no_grad()
    def _send_weights(self) -> None:
        keys = list(self.parameters)
        dtype = _widest(resident.dtype for resident in self._residents.values())
        weights = {key: self.local(key).flatten().to(dtype) for key in keys}
        sent = [[weights[key][p.here] for key, p in pieces] for pieces in self._pieces_of_mine(keys)]
        here = self._pieces_here(keys)
        blocks = self._swap(sent, [_num_elements(pieces) for pieces in here], "weight", dtype)
        residents = {key: self._by_expert(resident.detach()) for key, resident in self._residents.items()}
        for pieces, block in zip(here, blocks, strict=True):
            targets = [residents[key][p.expert][p.start : p.stop] for key, p in pieces]
            if targets:
                torch._foreach_copy_(targets, list(block.split([p.num_elements for _, p in pieces])))

    def _pieces_here(self, keys: Iterable[str]) -> list[KeyedPieces]:
        """By owner: what other ranks, and this one, own of the experts that live here."""
        return [self._shared(keys, owner, self.communicator.rank) for owner in self._ranks]

    def _pieces_of_mine(self, keys: Iterable[str]) -> list[KeyedPieces]:
        """By host: what this rank owns of the experts that live there."""
        return [self._shared(keys, self.communicator.rank, host) for host in self._ranks]

    def _shared(self, keys: Iterable[str], owner: int, host: int) -> KeyedPieces:
        lives_there = self.placement.multiplicity[host] > 0
        return [(key, p) for key in keys for p in self.cuts[key].pieces(owner).values() if lives_there[p.expert]]

    def _by_expert(self, rows: Tensor) -> dict[int, Tensor]:
        """Flat views ``[P]`` of ``rows [>= R, ...]`` by the expert they stand for."""
        residents = self.placement.residents(self.communicator.rank).tolist()
        return dict(zip(residents, rows.flatten(1), strict=False))

    # -- migration -------------------------------------------------------------------------------------------------

    def _elementwise(self, key: str, state: Mapping[str, Any]) -> list[str]:
        """Names of the state that moves along with a shard.

        Raises:
            ValueError: state that is neither one number for each element nor a scalar: nobody knows where it belongs.
        """
        local = self.local(key)
        tensors = {name: local_part(value) for name, value in state.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if value.numel() > 1 and value.shape != local.shape:
                raise ValueError(
                    f"the optimizer keeps state {name!r} of shape {tuple(value.shape)} for {self.name}.{key}, of which "
                    f"this rank owns {local.numel()} elements. Only element-wise and scalar state can move: use "
                    "optimizer_state='decoupled'"
                )
        return sorted(name for name, value in tensors.items() if value.shape == local.shape)

    def _migrate(self, moves: Sequence[_Move]) -> None:
        """Carry out all moves in one exchange of bytes: an optimizer may keep state in several precisions."""
        rank = self.communicator.rank
        sent = [[part for m in moves if other != rank for part in m.sources(rank, other)] for other in self._ranks]
        places = [[part for m in moves if other != rank for part in m.targets(other, rank)] for other in self._ranks]
        blocks = self._swap(sent, [sum(p.numel() for p in parts) for parts in places], "migration", torch.uint8)
        for parts, block in zip(places, blocks, strict=True):
            for place, part in zip(parts, block.split([p.numel() for p in parts]), strict=True):
                place.copy_(part)
        for move in moves:
            for place, part in zip(move.targets(rank, rank), move.sources(rank, rank), strict=True):
                place.copy_(part)

    def _swap(self, sent: Sequence[Sequence[Tensor]], recv: list[int], phase: str, dtype: torch.dtype) -> list[Tensor]:
        """Send ``sent[j]`` to each rank ``j``; return the ``recv[j]`` elements that each sent here."""
        parts = [part for to_rank in sent for part in to_rank]
        rows = (torch.cat(parts) if parts else torch.empty(0)).to(self.communicator.device, dtype)
        send = [sum(part.numel() for part in to_rank) for to_rank in sent]
        return list(self.communicator.all_to_all(rows, send, recv, phase, self.name).split(recv))

    @property
    def _ranks(self) -> range:
        return range(self.communicator.num_ranks)


@dataclass(frozen=True, eq=False)
class _Move:
    """One flat tensor on its way from the old owners to the new ones; parts of it are seen as bytes."""

    old: Tensor
    new: Tensor
    here: BoundShards
    there: BoundShards
    plan: tuple[Transfer, ...]

    def sources(self, src: int, dst: int) -> list[Tensor]:
        """What ``src``, this rank, has for ``dst``."""
        return self._parts(self.old, self.here.pieces(src), src, dst)

    def targets(self, src: int, dst: int) -> list[Tensor]:
        """Where ``dst``, this rank, keeps what ``src`` has for it."""
        return self._parts(self.new, self.there.pieces(dst), src, dst)

    def _parts(self, tensor: Tensor, pieces: Mapping[int, Piece], src: int, dst: int) -> list[Tensor]:
        size, raw = tensor.element_size(), tensor.view(torch.uint8)
        parts = []
        for t in self.plan:
            if (t.src, t.dst) == (src, dst):
                first = pieces[t.expert].offset + t.start - pieces[t.expert].start
                parts.append(raw[first * size : (first + t.num_elements) * size])
        return parts


def _num_elements(pieces: KeyedPieces) -> int:
    return sum(piece.num_elements for _, piece in pieces)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)
