"""``ExpertTensor``: a canonical ``[E, rows, cols]`` tensor of which this rank holds a part.

What users see of expert weights, gradients and optimizer state inside ``fit`` on several ranks. A ``DTensor`` with
three differences:

* what is added up over ranks (norms, sums, maxima, whether anything is NaN) is added up before anybody sees it, so that
  no number is ever one rank's part;
* plain tensors beside it count as replicated, so that ``clip_grad_norm_(self.parameters())`` or an L2 term over all
  parameters are right without a context manager;
* what is not known to be right on parts (random draws, sorting, maxima where a rank has no rows) runs on the whole
  tensor, on every rank alike. So does writing by index.

One thing is lost, as with any ``DTensor``: an index along the rows (``w[:, 0]``), or another shape where rows do not
divide by the ranks, makes a copy. Changing that in place leaves ``w`` as it was; ``w[:, 0] = ...`` is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication

from lightning_swiftmoe.parallel.mesh import ExpertMesh

# Each rank may change its part alone: the short cut spares a wrapper for every plain tensor beside ours.
_IN_PLACE = {torch._foreach_mul_, torch._foreach_div_, torch._foreach_zero_} | {
    torch._foreach_clamp_min_,
    torch._foreach_clamp_max_,
}
# Right on parts, whatever their number of rows, besides what torch itself tags as pointwise.
_BY_PARTS = {
    *("detach", "alias", "_to_copy", "copy_", "fill_", "zero_", "masked_fill", "masked_fill_"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"),
    *("select", "slice", "transpose", "permute", "t", "unsqueeze", "expand", "sum"),
}
# Torch gets these wrong, or refuses them, where the ranks' numbers of rows differ.
_BY_EQUAL_PARTS = {"view", "_unsafe_view", "squeeze", "mean", "linalg_vector_norm", "mm", "bmm", "unbind", "split"}


class ExpertTensor(DTensor):
    """A part of a canonical tensor; see the module. Make one with ``wrap``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _INSTEAD:
                return _INSTEAD[func](*args, **kwargs)
            if func in _IN_PLACE and not any(isinstance(arg, DTensor) for arg in args[1:]):
                return func([local_part(tensor) for tensor in args[0]], *args[1:], **kwargs)
            with implicit_replication():
                return _settled(func(*args, **kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        run = _on_parts if _runs_on_parts(func, args, kwargs) else _on_whole
        result = run(func, args, kwargs)
        if func._schema.is_mutable:
            return _changed(func, args, kwargs)[0] if func._schema.returns else None
        return _each(_as_ours, result)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertTensor:
        if id(self) not in memo:
            copied = ExpertTensor(self._local_tensor.detach().clone(), self._spec, requires_grad=False)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            f"a tensor of shape {tuple(self.shape)} is spread over {self.device_mesh.size()} ranks and cannot be "
            "pickled from one of them. Save with trainer.save_checkpoint, or call .full_tensor() on every rank first"
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


def edits(tensor: Tensor) -> tuple[int, ...]:
    """Changes whenever elements of ``tensor`` were changed in place, also through ``.data`` of an ``ExpertTensor``."""
    if not isinstance(tensor, ExpertTensor):
        return (tensor._version,)
    with torch._C.DisableTorchFunctionSubclass():
        data = getattr(tensor, "_seen_data", tensor)
        return tensor._version, data._version, tensor._local_tensor._version


def wants_gradient(tensor: Tensor) -> bool:
    """``tensor.requires_grad``, at a fraction of the time where it is an ``ExpertTensor``."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.requires_grad


# -- whole tensors -----------------------------------------------------------------------------------------------------


def _runs_on_parts(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    return _right_on_parts(func, any(_is_uneven(tensor) for tensor in _sharded(args, kwargs)))


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


def _on_parts(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` as torch runs it on a plain ``DTensor``, with plain tensors beside it cut or marked as it wants them.

    What is written into a sharded tensor is cut as that is: torch may decide to cut the sharded one anew, and refuse.
    """
    some = next(_sharded(args, kwargs))
    target = args[0] if func._schema.is_mutable and isinstance(args[0], DTensor) else None

    def for_torch(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            # Of another class torch would come back to us.
            return DTensor(value._local_tensor, value._spec, requires_grad=False)
        if value.ndim and target is not None:
            return DTensor(_part_of(target, value.expand(target.shape)), target._spec, requires_grad=False)
        if value.ndim and value.numel() == 1:
            return _replicated(value, some)
        return value

    return func(*_each(for_torch, args), **_each(for_torch, kwargs))


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``change`` applied to what is in it; operators take and give lists, and no deeper trees."""
    if type(value) in (list, tuple):
        return type(value)(_each(change, item) for item in value)
    if type(value) is dict:
        return {key: _each(change, item) for key, item in value.items()}
    return change(value)


def _replicated(value: Any, beside: DTensor) -> Any:
    """A plain tensor that every rank has, as torch wants it beside ``beside``; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    everywhere = [Replicate()] * beside.device_mesh.ndim
    return DTensor.from_local(value, beside.device_mesh, everywhere, run_check=False)


def _sharded(*containers: Any) -> Iterator[DTensor]:
    """Those among arguments, also in lists of them."""
    for item in containers:
        if isinstance(item, DTensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _sharded(*item)
        elif isinstance(item, dict):
            yield from _sharded(*item.values())


def _is_uneven(tensor: DTensor) -> bool:
    cuts = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return any(placement.is_shard() and tensor.shape[placement.dim] % size for size, placement in cuts)  # type: ignore[attr-defined]


def _on_whole(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on whole tensors, on every rank alike: the same draws, the same result. Collective."""
    some = next(_sharded(args, kwargs))
    whole_args, whole_kwargs = _each(_whole, args), _each(_whole, kwargs)
    result = func(*whole_args, **whole_kwargs)
    given, wholes = _changed(func, args, kwargs), _changed(func, whole_args, whole_kwargs)
    for tensor, whole in zip(given, wholes, strict=True):
        _keep_part(tensor, whole)
    return _each(lambda value: _replicated(value, some), result)


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that ``func`` writes into."""
    tensors: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors += value if isinstance(value, (list, tuple)) else [value]
    return tensors


def _whole(tensor: Any) -> Any:
    """The canonical tensor itself; anything else as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    everywhere = [Replicate()] * tensor.device_mesh.ndim
    return DTensor.redistribute(tensor.detach(), placements=everywhere)._local_tensor  # type: ignore[arg-type]


def _part_of(tensor: DTensor, whole: Tensor) -> Tensor:
    """What this rank holds of ``whole`` where ``tensor`` is cut; sends nothing."""
    return _replicated(whole, tensor).redistribute(placements=tensor.placements)._local_tensor


def _keep_part(tensor: Any, whole: Tensor) -> None:
    if isinstance(tensor, DTensor):
        tensor._local_tensor.copy_(_part_of(tensor, whole))


# -- what needs other means than torch's -------------------------------------------------------------------------------


def _get_data(tensor: Tensor) -> Tensor:
    """``tensor.data``. Whoever changes it in place leaves no trace in ``tensor`` itself, but does in ``_seen_data``."""
    if not isinstance(tensor, ExpertTensor):
        return tensor.data
    if not hasattr(tensor, "_seen_data"):
        tensor._seen_data = ExpertTensor(tensor._local_tensor, tensor._spec, requires_grad=False)  # type: ignore[attr-defined]
    return _as_ours(tensor._seen_data.detach())  # type: ignore[attr-defined]


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``: from now on they share memory, as far as this rank holds it."""
    if not isinstance(tensor, ExpertTensor):
        tensor.data = value
        return
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(
            f".data of an expert Parameter of shape {tuple(tensor.shape)} and {tensor.dtype} was set to "
            f"{tuple(value.shape)} and {value.dtype}: on several ranks neither may change in fit"
        )
    local = value._local_tensor if isinstance(value, DTensor) else _part_of(tensor, value.detach())
    tensor._local_tensor.data = local.to(tensor._local_tensor.device)
    increment_version(tensor._local_tensor)
    if hasattr(tensor, "_seen_data"):
        del tensor._seen_data


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value``. An index along the rows would write into a copy."""
    if not isinstance(tensor, ExpertTensor):
        tensor[_whole(index)] = _whole(value)
        return
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("an expert tensor that requires grad is written to by index: do it under torch.no_grad()")
    whole = _whole(tensor).clone()
    whole[_each(_whole, index)] = _whole(value)
    tensor._local_tensor.copy_(_part_of(tensor, whole))
    increment_version(tensor)


def _to_list(tensor: Tensor) -> Any:
    return _whole(tensor).tolist()


def _to_numpy(tensor: Tensor, **kwargs: Any) -> Any:
    if tensor.requires_grad and not kwargs.get("force"):
        raise RuntimeError("an expert tensor that requires grad is turned into an array: use .detach().numpy()")
    return _whole(tensor).numpy(**kwargs)


def _norms(tensors: list[Tensor], ord: float = 2.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """``torch._foreach_norm`` of plain and sharded tensors, with one all-reduce for all of them.

    Each expert counts once, whatever its replicas. Powers are added up in fp64: parts of different ranks round alike,
    however they are cut.
    """
    if ord <= 0:
        return [torch.linalg.vector_norm(_whole(tensor), ord, dtype=dtype) for tensor in tensors]
    # Where this rank has no rows, a zero stands in: it changes neither sums nor the largest magnitude.
    parts_here = [local_part(tensor) for tensor in tensors]
    filled = [part if part.numel() else part.new_zeros(1) for part in parts_here]
    norms = list(torch._foreach_norm(filled, ord, dtype=dtype))
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
    if isinstance(result, (list, tuple)):
        items = [_settled(item) for item in result]
        return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
    return result


def _settled_tensor(tensor: DTensor) -> Tensor:
    if any(placement.is_partial() for placement in tensor.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    if all(placement.is_replicate() for placement in tensor.placements):
        return tensor.to_local()
    return _as_ours(tensor)


def _as_ours(value: Any) -> Any:
    if type(value) is DTensor:
        value.__class__ = ExpertTensor
    return value


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch._foreach_norm: _norms,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.__setitem__: _set_item,
    Tensor.tolist: _to_list,
    Tensor.numpy: _to_numpy,
}
"""Where torch's own way would give a part, or leave no trace of an edit."""
