"""Dense Parameters that FSDP2 shards: gathered for a block's forward and backward, gradients reduced to their shards.

``torch.distributed.fsdp.fully_shard`` does all of it inside ``fit``. What is ours: which parts of a module are gathered
together, that ranks start from rank 0's weights, and that the user's module is afterwards what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.expert_tensor import ExpertTensor, as_expert_tensor, wants_gradient
from lightning_swiftmoe.parallel.mesh import dense_mesh_name
from lightning_swiftmoe.parallel.sharded import full_name


class ShardedDense:
    """``ShardHolder`` of all Parameters of ``module`` but experts. Collective.

    Blocks, which are the elements of the outermost ``nn.ModuleList``s, are gathered one at a time; everything else
    together with the module itself, for its forward and again for the backward. Parameters are cut along their first
    dim. They and their gradients are ``ExpertTensor``s, so that users see of both kinds the same, and may clip them
    together.

    Args:
        module: the user's, on the device.
        experts: Parameters that somebody else takes care of.
        everybody: all ranks, at least two.

    Raises:
        ValueError: a Parameter has no dims, or is shared by parts that are gathered apart.
    """

    def __init__(self, module: nn.Module, experts: Collection[nn.Parameter], everybody: Communicator) -> None:
        self._module = module
        self._everybody = everybody
        self._rank, self._num_ranks = everybody.rank, everybody.num_ranks
        self.originals = _dense(module, experts)
        self.shapes = {name: param.shape for name, param in self.originals.items()}
        self.state_device = everybody.device
        blocks = list(_blocks(module))
        _check(module, set(self.originals.values()), blocks)
        for tensor in dict.fromkeys((*self.originals.values(), *module.buffers())):
            assert not tensor.is_meta
            everybody.broadcast(tensor.data, "setup", "dense")
        self._traces = _Traces(module)
        mesh = init_device_mesh(everybody.device.type, (everybody.num_ranks,), mesh_dim_names=(dense_mesh_name(),))
        ignored = set(experts)
        for _, block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        self._root: FSDPModule = fully_shard(module, mesh=mesh, ignored_params=ignored, reshard_after_forward=False)
        self.stays_gathered = False
        module.register_forward_hook(lambda *_: None if self.stays_gathered else self.reshard())
        self._traces.take()
        self.parameters = _dense(module, experts)
        for original in self.originals.values():
            original.data = original.data.new_empty(0)
            original.grad = None
        self._trains = {name: param.requires_grad for name, param in self.parameters.items()}
        for param in dict.fromkeys(self.parameters.values()):
            as_expert_tensor(_as_dtensor(param))
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._reduced)
        self._num_reduced = 0

    def check_reduced(self) -> None:
        """Raise a RuntimeError where a backward ended without a gradient for any shard: FSDP2 did not see it.

        It sees those of what the module, or one of its blocks, has returned.
        """
        if not self._num_reduced:
            raise RuntimeError(
                "a backward brought no gradients to what dense='fsdp2' has cut: it was of no block's results, nor of "
                "the module's own. Call the module itself, self(...), in a manual training_step, or use dense='ddp'"
            )
        self._num_reduced = 0

    def reshard(self) -> None:
        """Let go of what is gathered together with the module.

        While it is, the module shows it instead of shards: ``zero_grad`` and clipping would pass these by, and a step
        would leave it as it was.
        """
        self._root.reshard()

    def share_buffers(self) -> None:
        """Every rank gets rank 0's, as before every training forward under DDP. Collective."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self._module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer.detach())
        for buffers in by_dtype.values():
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            self._everybody.broadcast(flat, "setup", "dense")
            parts = flat.split([buffer.numel() for buffer in buffers])
            # In place, and for autograd unseen: an earlier forward of the same step may have saved them.
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.data.copy_(part.view_as(buffer))

    def check_unchanged(self) -> None:
        """Raise a RuntimeError where somebody froze or unfroze a Parameter, which FSDP2 would not hear of."""
        for name, param in self.parameters.items():
            if wants_gradient(param) != self._trains[name]:
                raise RuntimeError(
                    f"{name}.requires_grad became {param.requires_grad} in fit, and dense='fsdp2' keeps what it was at "
                    "its beginning: freeze and unfreeze between fits, or use dense='ddp'"
                )

    def restore(self) -> None:
        """The user's module has its own Parameters again, whole, on every rank. Collective."""
        self.reshard()
        for name, original in self.originals.items():
            if not original.numel() or original.shape != self.shapes[name]:  # tied ones come by every name
                full = self.gather(name, self.local(name), "setup")
                assert full is not None
                original.data = full
            original.requires_grad_(self.parameters[name].requires_grad)
        self._leave(self.originals)

    def abandon(self) -> None:
        """After an error, without other ranks: the module's Parameters have no memory, as nobody can gather them."""
        lost = {
            original: nn.Parameter(torch.empty(self.shapes[name], dtype=original.dtype, device="meta"))
            for name, original in self.originals.items()
        }
        self._leave({name: lost[original] for name, original in self.originals.items()})

    def _leave(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._traces.remove()
        for name, param in parameters.items():
            owner, _, key = name.rpartition(".")
            self._module.get_submodule(owner).register_parameter(key, param)

    def _reduced(self, param: Tensor) -> None:
        self._num_reduced += 1
        as_expert_tensor(_as_dtensor(param.grad))

    # -- ``ShardHolder`` ---------------------------------------------------------------------------------------------

    def local(self, key: str) -> Tensor:
        """See ``ShardHolder``."""
        return _as_dtensor(self.parameters[key])._local_tensor.detach()

    def part(self, key: str, canonical: Tensor) -> Tensor:
        """``[own rows, ...]``: torch's chunks, of which the last ranks may have less, or nothing."""
        rows = -(-canonical.shape[0] // self._num_ranks)
        return canonical[self._rank * rows : (self._rank + 1) * rows]

    def wrapped(self, key: str, local: Tensor) -> Tensor:
        """See ``ShardHolder``."""
        return ExpertTensor(local, _as_dtensor(self.parameters[key])._spec, requires_grad=False)

    def gather(self, key: str, shard: Tensor, phase: str, to: int | None = None) -> Tensor | None:
        """See ``ShardHolder``; every rank has it for a moment."""
        full = self.wrapped(key, shard.to(self.state_device)).full_tensor()  # type: ignore[attr-defined]
        return full if to is None or to == self._rank else None

    def gather_for_checkpoint(self, key: str, shard: Tensor) -> Tensor | None:
        """See ``ShardHolder``."""
        full = self.gather(key, shard, "checkpoint", to=0)
        return None if full is None else full.cpu()


class StepsThroughForward(nn.Module):
    """Stands where Lightning expects DDP's wrapper: steps run inside the module's forward, whose hooks gather weights.

    Args:
        module: the user's, sharded.
        dense: whose weights are let go of at the end of a step, and gathered again for its backward.
        by_hand: backwards and optimizers are within steps; then they are let go of whenever the module has run.
    """

    def __init__(self, module: nn.Module, dense: ShardedDense, *, by_hand: bool) -> None:
        super().__init__()
        self.module = module
        self._dense = dense
        self._by_hand = by_hand

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._dense.check_unchanged()
        if torch.is_grad_enabled():
            self._dense.share_buffers()
        self._dense.stays_gathered = not self._by_hand
        try:
            return self.module(*args, **kwargs)
        finally:
            self._dense.stays_gathered = False
            self._dense.reshard()


def check_whole(module: nn.Module) -> None:
    """Raise a ValueError where somebody else has spread a Parameter over ranks."""
    for name, param in module.named_parameters():
        if type(param) is DTensor:
            raise ValueError(
                f"{name} is spread over {param.device_mesh}, by tensor parallelism or fully_shard, expected it whole: "
                "neither composes with the exchange of experts. Leave them out of configure_model; dense='fsdp2' cuts "
                "what is outside of experts"
            )


class _Traces:
    """What FSDP2 leaves in modules besides Parameters: other classes, attributes and hooks, some in the first forward.

    torch has no way back (2.13).

    Args:
        module: before any of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = list(module.modules())
        self._classes = [type(part) for part in self._parts]
        self._before = [_names_in(part) for part in self._parts]
        self._added: list[set[tuple[str, Any]]] = []

    def take(self) -> None:
        """``fully_shard`` is done."""
        self._added = [_names_in(part) - before for part, before in zip(self._parts, self._before, strict=True)]

    def remove(self) -> None:
        """As it was; what users did since stays."""
        for part, cls, added in zip(self._parts, self._classes, self._added, strict=True):
            part.__class__ = cls
            _module_state_mapping.pop(part, None)  # or another fit could not shard it
            for attribute, hook in added:
                if hook is None:
                    vars(part).pop(attribute, None)
                else:
                    vars(part)[attribute].pop(hook, None)
            for _, hooks in _tables(part):
                for number, hook in list(hooks.items()):
                    if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                        del hooks[number]


def _names_in(part: nn.Module) -> set[tuple[str, Any]]:
    """Attributes, and the hooks in those that are tables of hooks."""
    attributes = {(attribute, None) for attribute in vars(part)}
    return attributes | {(attribute, number) for attribute, hooks in _tables(part) for number in hooks}


def _tables(part: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    return [(name, value) for name, value in vars(part).items() if "hooks" in name and isinstance(value, dict)]


def _dense(module: nn.Module, experts: Collection[nn.Parameter]) -> dict[str, nn.Parameter]:
    """By every name of theirs."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: param for name, param in named if param not in experts}


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if isinstance(module, nn.ModuleList):
            yield name, child
        else:
            yield from _blocks(child, f"{name}.")


def _check(module: nn.Module, dense: Collection[nn.Parameter], blocks: list[tuple[str, nn.Module]]) -> None:
    block_of = {part: name for name, block in blocks for part in block.modules()}
    places: dict[nn.Parameter, tuple[str, str]] = {}
    for owner, part in module.named_modules():
        for key, param in part.named_parameters(recurse=False):
            if param not in dense:
                continue
            name, block = full_name(owner, key), block_of.get(part, "")
            if param.ndim == 0:
                raise ValueError(
                    f"dense='fsdp2' cuts Parameters along their first dim, and {name} has none: give it shape [1], or "
                    "use dense='ddp'"
                )
            first, place = places.setdefault(param, (name, block))
            if place != block:
                raise ValueError(
                    f"{first} and {name} are one Parameter, and dense='fsdp2' gathers {place or 'the module'} and "
                    f"{block or 'the module'} apart: use dense='ddp'"
                )


def _as_dtensor(param: Tensor | None) -> DTensor:
    assert isinstance(param, DTensor)
    return param
