"""Tensors that kernels find by an address in device memory, so that a recorded launch may work on others when replayed.

Shape legend: C cells, each with room for one address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton

MOST_TENSORS = 4  # that `point` takes at once
MOST_COPIES = 3


@dataclass(frozen=True, eq=False)
class Indirect:
    """What is known of a contiguous tensor on a 16-byte boundary beside its address.

    Args:
        cell: `[1]` int64 on the device: its address when the kernel runs.
        shape: of the tensor.
        dtype: of the tensor.
    """

    cell: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.cell.device


def pointed(cells: Tensor, tensors: Sequence[Tensor]) -> list[Indirect]:
    """What reaches these tensors, or others of their shapes and dtypes, once `point` has written the cells `[C]`."""
    return [Indirect(cells[at : at + 1], tensor.shape, tensor.dtype) for at, tensor in enumerate(tensors)]


def point(cells: Tensor, tensors: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
    """Write the addresses of tensors into cells, and small tensors into others: one launch on the current stream.

    Args:
        cells: `[C]` int64 on the device.
        tensors: at most C and 4, contiguous, on 16-byte boundaries. The caller holds them until kernels are done.
        copies: at most 3 pairs, what to copy and where to; contiguous, of the same dtype and size.

    Raises:
        ValueError: for more than fits, or a tensor that a kernel could not read.
    """
    if len(tensors) > min(cells.numel(), MOST_TENSORS) or len(copies) > MOST_COPIES:
        raise ValueError(
            f"at most {min(cells.numel(), MOST_TENSORS)} tensors and {MOST_COPIES} copies fit, got {len(tensors)} and "
            f"{len(copies)}"
        )
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"tensors must be contiguous and on a 16-byte boundary, got {tuple(tensor.shape)} with strides "
                f"{tensor.stride()} at offset {tensor.data_ptr() % 16}"
            )
    if not uses_triton(cells):
        point_reference(cells, tensors, copies)
        return
    from lightning_swiftmoe.kernels import indirect_launch

    with on_device(cells):
        indirect_launch.point(cells, tensors, copies)


def point_reference(cells: Tensor, tensors: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`point` in plain torch."""
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    cells[: len(tensors)] = addresses.to(cells.device)
    for source, target in copies:
        target.copy_(source)
