"""A second owner for every shard: its weights and optimizer state, stepped by another rank alike.

With ``redundancy=2`` each rank keeps a copy of the shards of one other rank, some ranks away, so that the two are on
different nodes. Before every step the owner's gradients, as they are after clipping and whatever the user did to them,
go to the holder of the copy, who takes the same step. Nothing else travels while nobody edits weights or state by hand:
owner and holder compare a sum of all bits, and only where it differs is everything sent anew.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_swiftmoe.kernels.to_host import to_host
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, local_part
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts

T = TypeVar("T")
State = dict[str, Any]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class ShardCopies:
    """Of one rank's shards, those that one optimizer steps on, held by this rank.

    Args:
        optimizer: holds sharded Parameters.
        of: whose a sharded Parameter is, and under which name.
        state: the ranks that hold shards.
        control: the same ranks, on their hosts.
        offset: the copies are those of the rank so many before this one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        of: Mapping[nn.Parameter, tuple[HostedExperts, str]],
        state: Communicator,
        control: Communicator,
        offset: int,
    ) -> None:
        self.optimizer = optimizer
        self.owner = (state.rank - offset) % state.num_ranks
        self._holder = (state.rank + offset) % state.num_ranks
        self._state, self._control = state, control
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        self._states: dict[nn.Parameter, State] = {}
        for param in sharded(optimizer):
            hosted, key = of[param]
            experts, _, *row = hosted.shapes[key]
            start, stop = hosted.cuts[key].row_interval(self.owner)
            local = local_part(param)
            self._copies[param] = nn.Parameter(local.new_empty(experts, stop - start, *row), param.requires_grad)
            self._states[self._copies[param]] = {}
        self._arrived: dict[nn.Parameter, tuple[Tensor, State]] = {}

    def are_as_owners(self) -> bool:
        """Whether every copy has the bits of its owner's shard, weights and state.

        Collective, and waits for the device: where it returns, all ranks have what was received before.
        """
        device = self._state.device  # without experts of this optimizer too: who waits for it has what was received
        sums = torch.stack([_sum_of_bits(self._own_tensors(), device), _sum_of_bits(self._held_tensors(), device)])
        everybody = self._control.gather_counts(to_host(sums), "copies").tolist()
        owned = [mine for mine, _ in everybody]
        copied = [everybody[(rank + self._holder - self._state.rank) % len(everybody)][1] for rank in range(len(owned))]
        return owned == copied

    def receive_all(self) -> None:
        """Weights and state, for ``install``. Collective.

        What of the state is no part of a tensor is the same on all ranks.
        """
        kept = {param: self.optimizer.state.get(param, {}) for param in self._copies}
        like = [held for param, held in self._copies.items() for _ in range(1 + len(_parts(kept[param])))]
        arrived = iter(self._swap(self._own_tensors(), like))
        self._arrived = {}
        for param, held in self._copies.items():
            weight = next(arrived)
            parts = {name: next(arrived) for name in _parts(kept[param])}
            rest = {name: copy.deepcopy(value) for name, value in kept[param].items() if name not in parts}
            self._arrived[held] = weight, {name: parts.get(name, rest.get(name)) for name in kept[param]}

    @torch.no_grad()
    def install(self) -> None:
        """What has arrived takes the place of the copies, which until then are whole."""
        for held, (weight, state) in self._arrived.items():
            held.copy_(weight)
            self._states[held] = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
            }
        self._arrived = {}

    def receive_gradients(self) -> None:
        """Of the step that comes. Collective."""
        wanted = [param for param in self._copies if param.grad is not None]
        grads = [local_part(param.grad) for param in wanted if param.grad is not None]
        copies = [self._copies[param] for param in wanted]
        for param in self._copies:
            self._copies[param].grad = None
        for copied_param, grad in zip(copies, self._swap(grads, copies), strict=True):
            copied_param.grad = grad

    def step(self, step: Callable[[], T]) -> T:
        """``step()`` of the optimizer on the copies, once what has arrived is in its place."""
        self.install()
        with self._in_place_of_shards():
            return step()

    def parts(self) -> dict[nn.Parameter, tuple[Tensor, State]]:
        """The copy of each Parameter's shard, and of its optimizer state."""
        return {param: (held.detach(), self._states[held]) for param, held in self._copies.items()}

    # -- inside ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_place_of_shards(self) -> Iterator[None]:
        """Groups and state of the optimizer are those of the copies. What a step changes in a group is undone."""
        optimizer = self.optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        state = optimizer.state
        for group in optimizer.param_groups:
            group["params"] = [self._copies[param] for param in group["params"] if param in self._copies]
        optimizer.state = defaultdict(dict, {held: values for held, values in self._states.items() if values})
        try:
            yield
        finally:
            self._states = {held: optimizer.state.get(held, {}) for held in self._states}
            optimizer.state = state
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)

    def _own_tensors(self) -> list[Tensor]:
        return [
            local_part(tensor).detach()
            for param in self._copies
            for tensor in (param, *_parts(self.optimizer.state.get(param, {})).values())
        ]

    def _held_tensors(self) -> list[Tensor]:
        return [
            tensor.detach()
            for held, state in self._states.items()
            for tensor in (held, *(value for value in state.values() if _is_part(value, held)))
        ]

    def _swap(self, sent: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """What the owner sent in place of ``sent``, in the shapes of ``like``: one message for each dtype."""
        received: list[Tensor] = [torch.empty(0)] * len(like)
        for dtype in dict.fromkeys(tensor.dtype for tensor in sent):
            indices = [index for index, tensor in enumerate(sent) if tensor.dtype == dtype]
            rows = torch.cat([sent[index].flatten() for index in indices])
            sizes = [like[index].numel() for index in indices]
            to = [rows.numel() if rank == self._holder else 0 for rank in range(self._state.num_ranks)]
            come = [sum(sizes) if rank == self.owner else 0 for rank in range(self._state.num_ranks)]
            arrived = self._state.all_to_all(rows, to, come, "copies", "all").split(sizes)
            for index, part in zip(indices, arrived, strict=True):
                received[index] = part.view(like[index].shape)
        return received


def sharded(optimizer: Optimizer) -> list[nn.Parameter]:
    """Parameters of which every rank holds a part."""
    params: list[nn.Parameter] = [param for group in optimizer.param_groups for param in group["params"]]
    return [param for param in params if isinstance(param, ExpertTensor)]


def _parts(state: State) -> dict[str, ExpertTensor]:
    """Of which every rank holds its own."""
    return {name: value for name, value in state.items() if isinstance(value, ExpertTensor)}


def _is_part(value: Any, held: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == held.shape


def _sum_of_bits(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of integers with the same bits, modulo 2**64: equal tensors have equal sums. Each counts with its place."""
    if not tensors:
        return torch.zeros((), dtype=torch.int64, device=device)
    sums = [_integers(tensor).sum(dtype=torch.int64) for tensor in tensors]
    places = torch.arange(1, len(sums) + 1, device=sums[0].device)
    return (torch.stack(sums) * places).sum()


def _integers(tensor: Tensor) -> Tensor:
    """The same bits, eight bytes at a time where they can be: memory is read as fast as it goes."""
    flat = tensor.contiguous().view(-1)
    in_eights = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if in_eights else _BITS[flat.element_size()])
