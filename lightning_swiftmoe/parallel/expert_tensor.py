"""``ExpertTensor``: a canonical ``[E, rows, ...]`` tensor of which this rank holds a part.

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

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import implicit_replication

from lightning_swiftmoe.parallel.expert_ops import (
    changed,
    each,
    is_in_pieces,
    local_part,
    norms_of,
    on_parts,
    on_whole,
    part_of,
    refuse_pieces,
    refuse_unknown,
    runs_on_parts,
    whole_of,
)
from lightning_swiftmoe.parallel.mesh import ExpertMesh

# Each rank may change its part alone: the short cut spares a wrapper for every plain tensor beside ours.
_IN_PLACE = {torch._foreach_mul_, torch._foreach_div_, torch._foreach_zero_} | {
    torch._foreach_clamp_min_,
    torch._foreach_clamp_max_,
}


# Asked for often, and nothing to add up: the short cut keeps a step's bookkeeping cheap.
FACTS = {getattr(Tensor, name).__get__ for name in ("requires_grad", "shape", "dtype", "device", "is_leaf")}


class ExpertTensor(DTensor):
    """A part of a canonical tensor; see the module. Make one with ``wrap``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in FACTS:
                return func(*args)
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
        refuse_unknown(func, args, kwargs)
        run = on_parts if runs_on_parts(func, args, kwargs) else on_whole
        result = run(func, args, kwargs)
        if func._schema.is_mutable:
            return changed(func, args, kwargs)[0] if func._schema.returns else None
        return each(_as_ours, result)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """As of any ``DTensor``: the whole, on every rank. Collective."""
        if is_in_pieces(self):
            refuse_pieces("full_tensor()")
        return super().full_tensor(grad_placements=grad_placements)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertTensor:
        if id(self) not in memo:
            copied = ExpertTensor(self._local_tensor.detach().clone(), self._spec, requires_grad=False)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _refuse_from_one_rank(self, "pickled")


def wrap(local: Tensor, shape: torch.Size, mesh: ExpertMesh) -> ExpertTensor:
    """The canonical tensor of ``shape [E, rows, ...]`` of which this rank holds ``local``; shares its memory."""
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(
        local.detach(), mesh.device_mesh, mesh.placements, run_check=False, shape=shape, stride=stride
    )
    as_expert_tensor(tensor)
    return tensor  # type: ignore[return-value]


def as_expert_tensor(tensor: DTensor) -> None:
    """Let a tensor that torch cut be one of ours: the same object, which others may hold already."""
    tensor.__class__ = ExpertTensor


def replace_local(tensor: Tensor, local: Tensor) -> None:
    """Let this rank hold other elements, in another number, of the same canonical tensor."""
    assert isinstance(tensor, ExpertTensor)
    tensor._local_tensor = local


def as_dtensor(tensor: DTensor, local: Tensor | None = None) -> DTensor:
    """torch's own class for the same part, or with ``local`` for another tensor cut the same way."""
    return DTensor(tensor._local_tensor if local is None else local, tensor._spec, requires_grad=False)


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
    local = value._local_tensor if isinstance(value, DTensor) else part_of(tensor, value.detach())
    tensor._local_tensor.data = local.to(tensor._local_tensor.device)
    increment_version(tensor._local_tensor)
    if hasattr(tensor, "_seen_data"):
        del tensor._seen_data


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value``. An index along the rows would write into a copy."""
    if not isinstance(tensor, ExpertTensor):
        tensor[whole_of(index)] = whole_of(value)
        return
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("an expert tensor that requires grad is written to by index: do it under torch.no_grad()")
    whole = whole_of(tensor).clone()
    whole[each(whole_of, index)] = whole_of(value)
    tensor._local_tensor.copy_(part_of(tensor, whole))
    increment_version(tensor)


def _to_list(tensor: Tensor) -> Any:
    return whole_of(tensor).tolist()


def _to_numpy(tensor: Tensor, **kwargs: Any) -> Any:
    if tensor.requires_grad and not kwargs.get("force"):
        raise RuntimeError("an expert tensor that requires grad is turned into an array: use .detach().numpy()")
    return whole_of(tensor).numpy(**kwargs)


def _storage(tensor: Tensor) -> Any:
    """What safetensors, and so ``save_pretrained``, asks for the bytes of."""
    return _refuse_from_one_rank(tensor, "written")


def _refuse_from_one_rank(tensor: Tensor, done: str) -> NoReturn:
    ranks = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
    raise RuntimeError(
        f"a tensor of shape {tuple(tensor.shape)} is spread over {ranks} ranks and cannot be {done} from one of them. "
        "Save with trainer.save_checkpoint, or call .full_tensor() on every rank first; of a transformers model "
        "save_pretrained(folder, state_dict=...) takes what that returns, and after fit it needs nothing"
    )


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
    """What is whole on every rank stays torch's: the result of ``to_local`` is all that matters of it."""
    if type(value) is DTensor and not all(placement.is_replicate() for placement in value.placements):
        value.__class__ = ExpertTensor
    return value


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch._foreach_norm: norms_of,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.__setitem__: _set_item,
    Tensor.storage: _storage,
    Tensor.tolist: _to_list,
    Tensor.numpy: _to_numpy,
}
"""Where torch's own way would give a part, or leave no trace of an edit."""
