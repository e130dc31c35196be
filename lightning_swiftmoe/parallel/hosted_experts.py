"""The experts of one or more MoE layers on several ranks, wherever their optimizer state lives.

*Parameters* are what users see: canonical ``[E, rows, ...]``, fp32 at least, of which this rank holds a shard.
*Residents* are working copies of the distinct experts in this rank's slots, in the dtype of the matrix products; they
belong to this class and nobody else sees them. Behind them may be room for transient copies of others' residents.
``DecoupledExperts`` cuts Parameters evenly over all ranks, once and for all; ``BoundExperts`` keeps them on the hosts
of each expert.

Shape suffixes: N ranks, E experts, R residents of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lightning_swiftmoe.layers.experts import ExpertMLPs, expert_parameters
from lightning_swiftmoe.parallel.communicator import Communicator, Pending
from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, edits, local_part, wants_gradient, wrap
from lightning_swiftmoe.parallel.mesh import ExpertMesh
from lightning_swiftmoe.parallel.shard_exchange import Locals, ShardExchangeFactory
from lightning_swiftmoe.parallel.symmetric_copies import SymmetricCopies
from lightning_swiftmoe.parallel.waiting_gradient import settle, wait
from lightning_swiftmoe.placement import Placement

# By key and for some rows, ``[n, rows, ...]`` of some experts after the other: weights that nobody has in one piece.
WeightSource: TypeAlias = Callable[[str, slice], Iterable[Tensor]]


class SavedWhole(Protocol):
    """Canonical weights in a checkpoint, of which a rank reads its part.

    Attributes:
        dtype: of what was saved.
    """

    @property
    def dtype(self) -> torch.dtype:
        """See above."""
        ...

    def whole(self) -> Tensor:
        """All of them."""
        ...

    def read_into(self, target: Tensor) -> None:
        """The part of them that ``target`` is, as users see Parameters."""
        ...


def check_unchanged(experts: ExpertMLPs, name: str) -> None:
    """Products take residents, which stand for the Parameters that experts were made with, and for nothing else.

    Raises:
        ValueError: somebody replaced these Parameters: pruning, weight norm, another parametrization.
    """
    for key in experts.parameter_names:
        if key not in experts.module._parameters:
            raise ValueError(
                f"{name}.{key} is no Parameter any more: pruning and parametrizations of experts would not reach the "
                "weights that ranks compute with. Leave experts out, or edit their weights in on_train_batch_end"
            )


class HostedExperts(ABC):
    """Takes over the Parameters of ``experts``; ``restore`` gives them back.

    With one rank whose matrix products run in the Parameters' dtype nothing is taken over: the layer computes with its
    own Parameters, as without a strategy.

    Args:
        experts: with canonical weights, the same on every rank.
        name: of the experts in the user's module.
        communicator: for expert state, of this rank's expert group.
        mesh: the ranks, for what users see; None where the group is one rank.
        placement: the first placement.
        num_sharers: ranks that the mean of gradients is over.
        replicas: the ranks that hold the same shards, one of each expert group; None with one group.
        compute_dtype: dtype of the residents of matrices; None keeps that of the Parameters.
        accumulates: whether gradients of several backwards add up before they are exchanged; they then add up, and
            travel, in at least fp32. A single one already has the residents' precision and loses nothing.
        gradient_dtype: in which gradients travel; None: that in which they add up.
        offload: keep Parameters, and with them gradients and optimizer state, on the host.
        masters: canonical weights in a higher precision than the Parameters', by parameter name, from a checkpoint.
        source: of the weights of Parameters on the meta device.
        transient_copies: room behind the residents for so many, where ranks can lend each other experts on the device.
        make_exchange: of a way for state to travel, for GPUs; None: by all-to-all of ``communicator``.
    """

    def __init__(
        self,
        experts: ExpertMLPs,
        name: str,
        communicator: Communicator,
        mesh: ExpertMesh | None,
        placement: Placement,
        *,
        num_sharers: int,
        replicas: Communicator | None = None,
        compute_dtype: torch.dtype | None = None,
        accumulates: bool = False,
        gradient_dtype: torch.dtype | None = None,
        offload: bool = False,
        masters: Mapping[str, Tensor | SavedWhole] | None = None,
        source: WeightSource | None = None,
        transient_copies: int = 0,
        make_exchange: ShardExchangeFactory | None = None,
    ) -> None:
        self.experts = experts
        self.name = name
        self.communicator = communicator
        self.mesh = mesh
        self.placement = placement
        self.group_size = communicator.num_ranks
        self.num_sharers = num_sharers
        self.replicas = replicas
        self.accumulates = accumulates
        self.gradient_dtype = gradient_dtype
        self.offload = offload
        self.make_exchange = make_exchange
        self.originals = expert_parameters(experts)
        self.shapes = {key: param.shape for key, param in self.originals.items()}
        self.dtypes = {key: param.dtype for key, param in self.originals.items()}
        self.cuts = {key: self._make_cut(shape) for key, shape in self.shapes.items()}
        self.on_gradient: Callable[[], None] = lambda: None
        self.exchanges_next: Callable[[], bool] = lambda: False
        self._specs: dict[str, Any] = {}
        self.parameters = {
            key: self._make_parameter(key, self._first_shard(key, masters or {}, source)) for key in self.originals
        }
        num_copies = transient_copies if self._reaches_peers else 0
        self._residents = self._make_residents(compute_dtype, num_copies)
        self.transient_copies = self._make_copies(num_copies) if num_copies else None
        self.forwards_since_backward = 0
        self.forwards_since_step = 0
        self.num_steps = 0
        self._gradients: Locals = {}
        self._given: set[str] = set()
        self._held: set[str] = set()
        self._removed: set[str] = set()
        self._weights: Pending[None] | None = None
        self._sent: list[tuple[int, ...]] = []

    # -- parameters, as users see them -------------------------------------------------------------------------------

    def withdraw(self) -> None:
        """Take the Parameters out of the module, so that moving it to a device leaves them where they are."""
        for key, original in self.originals.items():
            self.experts.module.register_parameter(key, None)
            if self.parameters[key] is not original and not original.is_meta:
                original.data = original.data.new_empty(0)
                original.grad = None

    def install(self) -> None:
        """Let the module show the Parameters."""
        for key, param in self.parameters.items():
            self.experts.module.register_parameter(key, param)

    def restore(self) -> None:
        """Give the user's Parameters their full canonical weights back, on every rank. Collective.

        Parameters on the meta device stay there: whole, their weights may not fit.
        """
        check_unchanged(self.experts, self.name)
        for key, original in self.originals.items():
            param = self.parameters[key]
            if not original.is_meta:
                full = self.gather(key, self.local(key), "setup")
                assert full is not None
                original.data = full.to(self.communicator.device, self.dtypes[key])
            original.grad = None
            original.requires_grad_(param.requires_grad)
            self.experts.module.register_parameter(key, original)
        self._residents = {}
        self._weights = None
        self._gradients = {}

    def local(self, key: str) -> Tensor:
        """This rank's shard of the weights, without a gradient; shares the Parameter's memory."""
        return local_part(self.parameters[key]).detach()

    @property
    def trainable(self) -> list[str]:
        """Names of the Parameters that want a gradient."""
        return [key for key, param in self.parameters.items() if wants_gradient(param)]

    def gather_for_checkpoint(self, key: str, shard: Tensor) -> Tensor | None:
        """``gather`` to the host of rank 0 of the job; None elsewhere. All expert groups hold the same: one sends."""
        if self.replicas is not None and self.replicas.rank > 0:
            return None
        full = self.gather(key, shard, "checkpoint", to=0)
        return None if full is None else full.cpu()

    @abstractmethod
    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """The canonical ``[E, rows, ...]`` tensor of which this rank has ``shard``; None where it goes elsewhere."""

    @abstractmethod
    def part(self, key: str, canonical: Tensor) -> Tensor:
        """This rank's shard of a canonical ``[E, rows, ...]`` tensor, in the shape of ``local(key)``."""

    def wrapped(self, key: str, local: Tensor) -> Tensor:
        """``local``, in the shape of ``local(key)``, as users see it."""
        if self.mesh is None:
            return local
        if key not in self._specs:
            self._specs[key] = wrap(local, self.shapes[key], self.mesh)._spec
        return ExpertTensor(local, self._specs[key], requires_grad=False)

    # -- residents, for computing ------------------------------------------------------------------------------------

    @property
    def computes_with_parameters(self) -> bool:
        """Whether the Parameters are their own residents."""
        return not self._residents

    def residents(self) -> Locals:
        """``[>= R, rows, ...]`` weights by resident, experts ascending, once they have arrived."""
        if self.computes_with_parameters:
            return dict(self.parameters)
        self.finish_weights()
        for key, resident in self._residents.items():
            wanted = wants_gradient(self.parameters[key])
            if resident.requires_grad != wanted:
                resident.requires_grad_(wanted)
        return self._residents

    @property
    def edited(self) -> bool:
        """Whether somebody changed Parameters since ``start_weights``, so that it is needed again: a local look.

        Edits are made on every rank alike, or ranks would wait for each other. With one rank, whose Parameters are
        plain tensors, those through ``.data`` leave no trace; they count until the first forward, which copies.
        """
        return bool(self._residents) and self._sent != self._edits()

    def _edits(self) -> list[tuple[int, ...]]:
        return [edits(param) for param in self.parameters.values()]

    def finish_weights(self) -> None:
        """From now on the current stream finds the weights that were on their way."""
        if self._weights is not None:
            self._weights.wait()
            self._weights = None
            if self.transient_copies is not None:
                self.transient_copies.forget()

    def count_forward(self) -> None:
        """Take note of a training forward with the residents."""
        self.forwards_since_backward += 1
        self.forwards_since_step += 1

    def start_weights(self, placement: Placement) -> None:
        """Weight phase: every shard starts on its way to all hosts of its expert under ``placement``, now in force."""
        self.finish_weights()
        self.placement = placement
        if self._residents:
            self._sent = self._edits()
            self._weights = self._start_weights() if self.communicator.num_ranks > 1 else Pending(self._copy_weights)

    # -- gradients ---------------------------------------------------------------------------------------------------

    @property
    def has_all_gradients(self) -> bool:
        """Whether autograd has delivered the gradient of every trainable resident."""
        return all(key in self._gradients for key in self.trainable)

    @property
    def keeps_given_gradients(self) -> bool:
        """Whether tensors that ``take_gradients`` was given still wait to be exchanged."""
        return bool(self._given)

    @property
    def copies_gradients(self) -> bool:
        """Whether ``take_gradients`` adds up in memory of its own: it widens what it is given."""
        return self.accumulates and all(resident.dtype.itemsize < 4 for resident in self._residents.values())

    @property
    def wants_exchange(self) -> bool:
        """Whether the gradient phase has work here: a structural fact, the same on every rank whatever its tokens."""
        return self.forwards_since_step > 0 and bool(self._exchanged)

    @property
    def _exchanged(self) -> list[str]:
        return [key for key in self.trainable if key not in self._removed]

    def take_gradients(self, grads: Locals) -> None:
        """One backward's gradients of the residents, ``[>= R, rows, ...]``, join those that wait to be exchanged.

        They are not copied: until then nobody may write to them.

        Raises:
            RuntimeError: nobody knows of the forward, so that they would never be exchanged. The same on every rank.
        """
        if self.forwards_since_step == 0:
            raise RuntimeError(
                "gradients of experts came from a forward that did not count as training: in eval mode without "
                "gradients, as torch.utils.checkpoint(use_reentrant=True) runs it, or from before the optimizer's last "
                "step. Put the model in train mode, or use_reentrant=False, and go back before the optimizer steps"
            )
        for key, grad in grads.items():
            self._add_gradient(key, grad)
        self.on_gradient()

    def gradient_memory(self) -> Locals | None:
        """Where the next gradients should be written so that they travel without a copy; None: anywhere.

        The current stream may write there.
        """
        return None

    def start_gradients(self) -> Pending[Locals]:
        """Gradient phase: the mean over ranks of every expert's gradient starts on its way to the shards."""
        grads = {key: self._take_gradient(key) for key in self._exchanged}
        if self.communicator.num_ranks > 1 or self.replicas is not None:
            if self.gradient_dtype is not None:
                grads = {key: grad.to(self.gradient_dtype) for key, grad in grads.items()}
            return self._start_gradients(grads)
        return Pending(lambda: {key: self._as_local(key, grad) for key, grad in grads.items()})

    def add_gradients(self, totals: Locals) -> None:
        """What ``start_gradients`` brought joins the gradients of the Parameters: something may be there already."""
        for key, total in totals.items():
            param = self.parameters[key]
            if param.grad is None:
                param.grad = self.wrapped(key, total)
            else:
                settle(param.grad)
                local_part(param.grad).add_(total)

    def drop_gradients(self) -> None:
        """Forget what was not exchanged."""
        self._gradients.clear()
        self._given.clear()
        self._held.clear()
        self._removed.clear()

    def hold_place(self, exchange: Callable[[], None]) -> None:
        """``.grad`` waits for what adds up here: whoever looks exchanges it, whoever removes it drops that too.

        On every rank alike, also where the loss did not reach this layer.

        Args:
            exchange: see ``wait``.
        """
        if not self.wants_exchange:
            return
        for key in self.trainable:
            param = self.parameters[key]
            self._held.add(key)
            if param.grad is None:
                param.grad = self.wrapped(key, torch.zeros_like(self.local(key)))
            wait(param.grad, exchange)

    def forget_removed(self) -> set[str]:
        """Drop what waited behind a place that was removed; names the Parameters. The same on every rank."""
        removed = {key for key in self._held if self.parameters[key].grad is None}
        for key in removed:
            self._gradients.pop(key, None)
        self._held.clear()
        return removed

    def begin_backward(self) -> None:
        """New gradients are about to come, also of what was removed."""
        self.forget_removed()
        self._removed.clear()

    def leave_out_removed(self) -> None:
        """No backward came since they were removed: as in one process, they have no gradient."""
        self._removed |= self.forget_removed()

    # -- what the place of the state decides -------------------------------------------------------------------------

    @abstractmethod
    def move_state(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Migration phase: bring Parameters and their optimizer state to the owners under ``placement``.

        Args:
            placement: the next one; ``start_weights`` with it follows.
            states: ``optimizer.state`` of the optimizer that steps on them.
        """

    @abstractmethod
    def _make_cut(self, shape: torch.Size) -> Any:
        """Who owns what of a parameter ``[E, rows, ...]``."""

    @abstractmethod
    def _start_gradients(self, grads: Locals) -> Pending[Locals]:
        """``start_gradients`` with several ranks in the job, of gradients ``[>= R, rows, ...]``."""

    @abstractmethod
    def _start_weights(self) -> Pending[None]:
        """``start_weights`` with several ranks, under ``self.placement``."""

    # -- setting up --------------------------------------------------------------------------------------------------

    def _first_shard(self, key: str, masters: Mapping[str, Tensor | SavedWhole], source: WeightSource | None) -> Tensor:
        master = masters.get(key)
        if isinstance(master, Tensor):
            return self.part(key, master)
        if master is not None:
            return self._saved_part(key, master)
        original = self.originals[key]
        if not original.is_meta:
            return self.part(key, original.detach())
        assert source is not None
        return self._shard_from(source, key)

    def _saved_part(self, key: str, saved: SavedWhole) -> Tensor:
        """``part`` of what was saved."""
        return self.part(key, saved.whole())

    def _shard_from(self, source: WeightSource, key: str) -> Tensor:
        """``part`` of what comes from there."""
        return self.part(key, torch.cat(list(source(key, slice(None)))))

    def _make_parameter(self, key: str, shard: Tensor) -> nn.Parameter:
        """At least fp32: low-precision weights would swallow small updates."""
        original = self.originals[key]
        dtype = torch.promote_types(torch.promote_types(shard.dtype, original.dtype), torch.float32)
        local = shard.to(self.state_device, dtype, copy=True).contiguous()
        if self.mesh is None:
            original.data = self.pinned(local)
            return original
        return nn.Parameter(self.wrapped(key, self.pinned(local)), requires_grad=original.requires_grad)

    @property
    def state_device(self) -> torch.device:
        """Where Parameters and their state are."""
        return torch.device("cpu") if self.offload else self.communicator.device

    def pinned(self, tensor: Tensor) -> Tensor:
        """Host memory that a GPU reads at full speed, where one will."""
        return tensor.pin_memory() if self.offload and self.communicator.device.type == "cuda" else tensor

    def _make_residents(self, compute_dtype: torch.dtype | None, num_copies: int) -> Locals:
        narrow = any(dtype != self.local(key).dtype for key, dtype in self.dtypes.items())
        if self.communicator.num_ranks == 1 and self.replicas is None and not self.offload and not narrow:
            return {}
        rows = min(self.placement.slots_per_rank, self.placement.num_experts) + num_copies
        residents = {}
        for key, shape in self.shapes.items():
            dtype = self.dtypes[key]
            is_matrix = len(shape) > 2  # autocast does not cast what a product's result is added to
            if compute_dtype is not None and dtype == torch.float32 and is_matrix:
                dtype = compute_dtype
            resident = self._make_resident(key, (rows, *shape[1:]), dtype)
            resident.requires_grad_()
            resident.register_post_accumulate_grad_hook(partial(self._after_backward, key))
            residents[key] = resident
        return residents

    def _make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros ``[>= R, rows, ...]`` on the device."""
        return torch.zeros(shape, dtype=dtype, device=self.communicator.device)

    @property
    def _reaches_peers(self) -> bool:
        """Whether ranks read and write each other's residents."""
        return False

    def _make_copies(self, most: int) -> SymmetricCopies | None:
        """How this rank borrows and lends residents, of which the last ``most`` are room for copies."""
        return None

    # -- gradients, inside -------------------------------------------------------------------------------------------

    def _after_backward(self, key: str, resident: Tensor) -> None:
        """Autograd reached a resident. It has no gradient there where the gradient was handed over directly."""
        grad, resident.grad = resident.grad, None
        if grad is not None:
            self.take_gradients({key: grad})

    def _add_gradient(self, key: str, grad: Tensor) -> None:
        """Gradients of low-precision residents add up in fp32, not in their own precision."""
        earlier = self._gradients.get(key)
        adds = self.accumulates or earlier is not None
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)) if adds else grad
        kept = wide if earlier is None else earlier + wide
        self._gradients[key] = kept
        if kept is grad:
            self._given.add(key)
        else:
            self._given.discard(key)

    def _take_gradient(self, key: str) -> Tensor:
        """This rank's gradient by resident. Where the loss never reached the layer it is zero: others wait for it."""
        grad = self._gradients.pop(key, None)
        self._given.discard(key)
        if grad is not None:
            return grad
        resident = self._residents[key]
        dtype = torch.promote_types(resident.dtype, torch.float32) if self.accumulates else resident.dtype
        return torch.zeros_like(resident, dtype=dtype, requires_grad=False)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for key, resident in self._residents.items():
            resident.copy_(self.local(key), non_blocking=True)

    def _as_local(self, key: str, grad: Tensor) -> Tensor:
        """One rank: residents are the experts in order and the shard is the whole, so nothing needs to move."""
        local = self.local(key)
        return (grad / self.num_sharers if self.num_sharers > 1 else grad).to(local.device, local.dtype)
