"""Launch of the kernel that writes addresses. No constant depends on the number of tokens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_swiftmoe.kernels import indirect_triton
from lightning_swiftmoe.kernels.indirect import MOST_COPIES, MOST_TENSORS
from lightning_swiftmoe.kernels.launch import Launcher, cdiv

_BLOCK = 1024  # elements copied by one program
_NOTHING = (None, None, 0)

_point = Launcher(indirect_triton.point_kernel)


def point(cells: Tensor, tensors: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`indirect.point`."""
    # An empty tensor may be nowhere, and a small number would be of another type.
    addresses = [tensor.data_ptr() or cells.data_ptr() for tensor in tensors]
    missing = [0] * (MOST_TENSORS - len(addresses))
    triples: list[tuple[Any, Any, int]] = [(source, target, source.numel()) for source, target in copies]
    triples += [_NOTHING] * (MOST_COPIES - len(triples))
    most = max(size for _, _, size in triples)
    _point(
        (max(cdiv(most, _BLOCK), 1), 1, 1),
        cells,
        *addresses,
        *missing,
        *triples[0],
        *triples[1],
        *triples[2],
        NUM_TENSORS=len(addresses),
        BLOCK=_BLOCK,
    )
