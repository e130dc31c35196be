"""``ExpertTensor``: a canonical ``[E, rows, cols]`` tensor of which this rank holds a part.

What users see of expert weights, gradients and optimizer state inside ``fit`` on several ranks. A ``DTensor`` with two
differences: what is added up over ranks (norms, sums, maxima, whether anything is NaN) is added up before anybody sees it,
so that no number is ever one rank's part; and plain tensors beside it count as replicated, so that
``clip_grad_norm_(self.parameters())`` or an L2 term over all parameters are right without a context manager.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication

from lightning_swiftmoe.parallel.mesh import ExpertMesh

# Each rank may change its part alone: the short cut spares a wrapper for every plain tensor beside ours.
_IN_PLACE = {torch._foreach_mul_, torch._foreach_div_, torch._foreach_zero_} | {
    torch._foreach_clamp_min_,
    torch._foreach_clamp_max_,
}


# Asked for often, and nothing to add up: the short cut keeps a step's bookkeeping cheap.
_FACTS = {
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.is_leaf.__get__,
}


class ExpertTensor(DTensor):
    """A part of a canonical tensor; see the module. Make one with ``wrap``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args)
            if func is torch._foreach_norm:
                return _norms(*args, **(kwargs or {}))
            if func in _IN_PLACE and not any(isinstance(arg, DTensor) for arg in args[1:]):
                return func([local_part(tensor) for tensor in args[0]], *args[1:], **(kwargs or {}))
            with implicit_replication():
                return _settled(func(*args, **(kwargs or {})))

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertTensor:
        if id(self) not in memo:
            copied = ExpertTensor(self._local_tensor.detach().clone(), self._spec, requires_grad=False)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            f"a tensor of shape {tuple(self.shape)} is spread over {self.device_mesh.size()} ranks and cannot be pickled "
            "from one of them. Save with trainer.save_checkpoint, or call .full_tensor() on every rank first"
        )


def wrap(local: Tensor, shape: torch.Size, mesh: ExpertMesh) -> ExpertTensor:
    """The canonical tensor of ``shape [E, rows, cols]`` of which this rank holds ``local``; shares its memory."""
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(
        local.detach(), mesh.device_mesh, mesh.placements, run_check=False, shape=shape, stride=stride
    )
    tensor.__class__ = ExpertTensor
    return tensor  # type: ignore[return-value]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory: of a plain tensor all of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def replace_local(tensor: Tensor, local: Tensor) -> None:
    """Let this rank hold other elements, in another number, of the same canonical tensor."""
    assert isinstance(tensor, ExpertTensor)
    tensor._local_tensor = local


def _norms(tensors: list[Tensor], ord: float = 2.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """``torch._foreach_norm`` of plain and sharded tensors, with one all-reduce for all of them.

    Each expert counts once, whatever its replicas. Powers are added up in fp64: parts of different ranks round alike,
    however they are cut.
    """
    norms = list(torch._foreach_norm([local_part(tensor) for tensor in tensors], ord, dtype=dtype))
    sharded = [i for i, tensor in enumerate(tensors) if isinstance(tensor, DTensor)]
    first = tensors[sharded[0]]
    assert isinstance(first, DTensor)
    parts = torch.stack([norms[i] for i in sharded]).double()
    group = shard_group(first)
    if ord == float("inf"):
        dist.all_reduce(parts, dist.ReduceOp.MAX, group=group)
    else:
        parts = parts.abs().pow(ord)
        dist.all_reduce(parts, group=group)
        parts = parts.pow(1 / ord)
    for i, norm in zip(sharded, parts, strict=True):
        norms[i] = norm.to(norms[i].dtype)
    return norms


def shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """The ranks that hold parts of ``tensor``, each another one."""
    (dim,) = (i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(dim)


def _settled(result: Any) -> Any:
    """Results as users may see them: nothing left to be added up over ranks."""
    if isinstance(result, DTensor):
        return _settled_tensor(result)
    if type(result) in (list, tuple):
        return type(result)(_settled(item) for item in result)
    return result


def _settled_tensor(tensor: DTensor) -> Tensor:
    if any(placement.is_partial() for placement in tensor.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    if all(placement.is_replicate() for placement in tensor.placements):
        return tensor.to_local()
    if type(tensor) is DTensor:
        tensor.__class__ = ExpertTensor
    return tensor
