"""Grouped matrix products over rows sorted by expert, on torch's own kernels.

Shape legend: R rows, E experts, `ends[E]` int32 one past the last row of each expert. Rows at and beyond `ends[-1]`
belong to no expert: their outputs are **undefined** (torch leaves them uninitialised), so callers must mask them.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_swiftmoe.kernels.to_host import to_host

_FAST_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _torch_grouped(*operands: Tensor) -> bool:
    """Whether `grouped_mm` takes the operands: it has no fp64, and wants 16-byte strides."""
    first = operands[0]
    if first.dtype not in _FAST_DTYPES or first.device.type == "cpu" or any(t.numel() == 0 for t in operands):
        return False  # on CPU its kernels are the loop below, without the zeroed tail
    return all((t.shape[-1] * t.element_size()) % 16 == 0 for t in operands)


def kept_in(out: Tensor | None, result: Tensor) -> Tensor:
    """The result, copied into `out` if there is one: torch's `grouped_mm` takes no buffer to write to."""
    return result if out is None else out.copy_(result)


def _segments(ends: Tensor) -> list[tuple[int, int]]:
    """Start and end row of every expert, on the host: synchronises on an accelerator."""
    bounds = [0, *to_host(ends).tolist()]
    return list(itertools.pairwise(bounds))


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor, out: Tensor | None = None) -> Tensor:
    """`out[r] = rows[r] @ weight[expert of r]` for `rows[R, K]` and `weight[E, K, N]` (any strides)."""
    contiguous = weight if weight.stride(-1) == 1 else weight.mT
    if _torch_grouped(rows, contiguous):
        return kept_in(out, F.grouped_mm(rows, weight, offs=ends))
    out = rows.new_zeros(rows.shape[0], weight.shape[-1]) if out is None else out
    for expert, (start, end) in enumerate(_segments(ends)):
        if end > start:
            torch.mm(rows[start:end], weight[expert], out=out[start:end])
    return out


def grouped_weight_grad(left: Tensor, right: Tensor, ends: Tensor, out: Tensor | None = None) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]` for `left[R, M]` and `right[R, N]`; zeros for an empty expert."""
    if _torch_grouped(left, right):
        return kept_in(out, F.grouped_mm(left.mT, right, offs=ends))
    shape = ends.shape[0], left.shape[1], right.shape[1]
    out = left.new_zeros(shape) if out is None else out.zero_()
    for expert, (start, end) in enumerate(_segments(ends)):
        if end > start:
            torch.mm(left[start:end].mT, right[start:end], out=out[expert])
    return out
