"""Functions of sharded tensors: on this rank's parts where that is known to be right, else on whole tensors.

``DTensor`` alone would go wrong, hang or refuse where the ranks' numbers of rows differ, draws other random numbers
than one process, and knows nothing of experts in pieces (``BoundExperts``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightning_swiftmoe.parallel.mesh import is_dense_mesh

# Right on parts, whatever their number of rows, besides what torch itself tags as pointwise.
_BY_PARTS = {
    *("detach", "alias", "_to_copy", "copy_", "fill_", "zero_", "masked_fill", "masked_fill_"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"),
    *("select", "slice", "transpose", "permute", "t", "unsqueeze", "expand", "sum"),
}
# Torch gets these wrong, or refuses them, where the ranks' numbers of rows differ.
_BY_EQUAL_PARTS = {"view", "_unsafe_view", "squeeze", "mean", "linalg_vector_norm", "mm", "bmm", "unbind", "split"}


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory: of a plain tensor all of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def runs_on_parts(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator gives the same on parts, put together again, as on whole tensors."""
    return _is_total_norm(func, args) or _right_on_parts(
        func, any(_is_uneven(tensor) for tensor in _sharded(args, kwargs))
    )


def _is_total_norm(func: Any, args: Any) -> bool:
    """Whether it is a norm over all elements, for which ``norms_of`` needs no more than parts."""
    if func is not torch.ops.aten.linalg_vector_norm.default or (len(args) > 2 and args[2] is not None):
        return False
    return any(placement.is_shard() for placement in args[0].placements)


@cache
def _right_on_parts(func: Any, uneven: bool) -> bool:
    name = func._schema.name.removeprefix("aten::")
    # One answer, though torch tags it as pointwise.
    if torch.Tag.nondeterministic_seeded in func.tags or name == "equal":
        return False
    if torch.Tag.pointwise in func.tags or name in _BY_PARTS:
        return True
    if name.startswith("_foreach_"):
        return name not in ("_foreach_norm", "_foreach_max")
    return name in _BY_EQUAL_PARTS and not uneven


def refuse_unknown(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where an operator could only give something else than in one process.

    Raises:
        RuntimeError: it changes a shape in place, computes with dense weights that are not gathered, or needs rows of
            experts that are in pieces.
    """
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(
            f"{func} would change the shape of an expert tensor in place: use the function that returns another"
        )
    _refuse_alone(func, args, kwargs)
    if any(is_in_pieces(tensor) for tensor in _sharded(args, kwargs)) and not _right_on_pieces(func, args, kwargs):
        refuse_pieces(str(func))


def _refuse_alone(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A layer's product with a dense weight that is not gathered would take this rank's tokens for everybody's."""
    dense = next((tensor for tensor in _sharded(args, kwargs) if is_dense_mesh(tensor.device_mesh)), None)
    if dense is None:
        return
    plain = [x for x in _flat(args, kwargs) if isinstance(x, Tensor) and not isinstance(x, DTensor) and x.numel() > 1]
    is_elementwise = torch.Tag.pointwise in func.tags or func._schema.is_mutable
    if all(is_elementwise and _fits_into(value.shape, dense.shape) for value in plain):
        return
    raise RuntimeError(
        f"{func} of a tensor of this rank and a Parameter of shape {tuple(dense.shape)} that dense='fsdp2' has cut, "
        "which is whole only while its block, or the module, runs: compute with it in forward, and in a manual "
        "training_step call the module itself, self(...)"
    )


def _fits_into(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether it is broadcast to ``whole``, which stays as it is."""
    sizes = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, expected) for size, expected in sizes)


def refuse_pieces(what: str) -> None:
    """Raise: ``what`` cannot be had of experts in pieces."""
    raise RuntimeError(
        f"optimizer_state='bound' keeps experts in pieces that are no rows of theirs: {what} needs more of them than "
        "one element at a time, or their sum. Use optimizer_state='decoupled', or trainer.save_checkpoint for the whole"
    )


def is_in_pieces(tensor: DTensor) -> bool:
    """Whether this rank's part has another shape than torch believes; see ``BoundExperts``."""
    cut = {placement.dim for placement in tensor.placements if placement.is_shard()}  # type: ignore[attr-defined]
    sizes = zip(tensor.shape, tensor._local_tensor.shape, strict=True)
    return bool(cut) and any(whole != part for dim, (whole, part) in enumerate(sizes) if dim not in cut)


def _right_on_pieces(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if func is torch.ops.aten.sum.default or _is_total_norm(func, args):
        return True
    if name in ("select", "slice", "transpose", "permute", "t", "unsqueeze", "expand", "sum", "new_empty", "new_full"):
        return False
    tensors = [value for value in _flat(args, kwargs) if isinstance(value, Tensor)]
    alike = all(is_in_pieces(value) if isinstance(value, DTensor) else value.numel() == 1 for value in tensors)
    return alike and _right_on_parts(func, uneven=True)


def on_parts(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` as torch runs it on a plain ``DTensor``, with plain tensors beside it cut or marked as it wants them.

    What is written into a sharded tensor is cut as that is: torch may decide to cut the sharded one anew, and refuse.
    """
    some = next(_sharded(args, kwargs))
    if _is_total_norm(func, args):
        (norm,) = norms_of([args[0]], *args[1:2], **kwargs)
        return _replicated(norm, some)
    target = args[0] if func._schema.is_mutable and isinstance(args[0], DTensor) else None

    def for_torch(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            # Of another class torch would come back to us.
            return DTensor(value._local_tensor, value._spec, requires_grad=False)
        if value.ndim and target is not None:
            return DTensor(part_of(target, value.expand(target.shape)), target._spec, requires_grad=False)
        if value.ndim and value.numel() == 1:
            return _replicated(value, some)
        return value

    return func(*each(for_torch, args), **each(for_torch, kwargs))


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``change`` applied to what is in it; operators take and give lists, and no deeper trees."""
    if type(value) in (list, tuple):
        return type(value)(each(change, item) for item in value)
    if type(value) is dict:
        return {key: each(change, item) for key, item in value.items()}
    return change(value)


def _replicated(value: Any, beside: DTensor) -> Any:
    """A plain tensor that every rank has, as torch wants it beside ``beside``; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    everywhere = [Replicate()] * beside.device_mesh.ndim
    return DTensor.from_local(value, beside.device_mesh, everywhere, run_check=False)


def _sharded(*containers: Any) -> Iterator[DTensor]:
    """Those among arguments, also in lists of them."""
    return (item for item in _flat(*containers) if isinstance(item, DTensor))


def _flat(*containers: Any) -> Iterator[Any]:
    for item in containers:
        if isinstance(item, (list, tuple)):
            yield from _flat(*item)
        elif isinstance(item, dict):
            yield from _flat(*item.values())
        else:
            yield item


def _is_uneven(tensor: DTensor) -> bool:
    cuts = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(placement.is_shard() and tensor.shape[placement.dim] % size for size, placement in cuts)  # type: ignore[attr-defined]


def on_whole(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on whole tensors, on every rank alike: the same draws, the same result. Collective."""
    some = next(_sharded(args, kwargs))
    whole_args, whole_kwargs = each(whole_of, args), each(whole_of, kwargs)
    result = func(*whole_args, **whole_kwargs)
    given, wholes = changed(func, args, kwargs), changed(func, whole_args, whole_kwargs)
    for tensor, whole in zip(given, wholes, strict=True):
        _keep_part(tensor, whole)
    return each(lambda value: _replicated(value, some), result)


def changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that ``func`` writes into."""
    tensors: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors += value if isinstance(value, (list, tuple)) else [value]
    return tensors


def whole_of(tensor: Any) -> Any:
    """The canonical tensor itself; anything else as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if is_in_pieces(tensor):
        refuse_pieces("this")
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    return DTensor.redistribute(tensor.detach(), placements=everywhere)._local_tensor  # type: ignore[arg-type]


def part_of(tensor: DTensor, whole: Tensor) -> Tensor:
    """What this rank holds of ``whole`` where ``tensor`` is cut; sends nothing."""
    return _replicated(whole, tensor).redistribute(placements=tensor.placements)._local_tensor


def _keep_part(tensor: Any, whole: Tensor) -> None:
    if isinstance(tensor, DTensor):
        tensor._local_tensor.copy_(part_of(tensor, whole))


def norms_of(tensors: list[Tensor], ord: float = 2.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """``torch._foreach_norm`` of plain and sharded tensors, with one all-reduce for all that the same ranks share.

    Each expert counts once, whatever its replicas. Powers are added up in fp64: parts of different ranks round alike,
    however they are cut.
    """
    if ord <= 0:
        return [torch.linalg.vector_norm(whole_of(tensor), ord, dtype=dtype) for tensor in tensors]
    # Where this rank has no rows, a zero stands in: it changes neither sums nor the largest magnitude.
    parts_here = [local_part(tensor) for tensor in tensors]
    filled = [part if part.numel() else part.new_zeros(1) for part in parts_here]
    norms = list(torch._foreach_norm(filled, ord, dtype=dtype))
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            by_group.setdefault(shard_group(tensor), []).append(i)
    for group, sharded in by_group.items():
        parts = torch.stack([norms[i] for i in sharded]).double()
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
