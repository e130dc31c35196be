"""Launches of the row-moving kernels. No constant depends on the number of tokens.

Shape legend: T tokens, k choices, d width of a row, N ranks, R residents. `peers` is `[N]` addresses, or one buffer of
this process. Tensors of tokens are given directly, or all of a launch as `Indirect`.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_swiftmoe.kernels.indirect import Indirect
from lightning_swiftmoe.kernels.launch import Launcher, cdiv, next_power_of_2
from lightning_swiftmoe.kernels.token_dispatch import move_triton
from lightning_swiftmoe.kernels.token_dispatch.address import Address

_PUSHED = 2048  # elements that a pushing or clearing program holds
_PULLED = 1024  # the same in columns for a pulling program, which sums in fp32
_SCALARS = 256  # assignments of a program that moves scalars
_CLEARERS = 8  # programs that share the padding of one resident
_ELEMENT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

_push_rows = Launcher(move_triton.push_rows_kernel)
_pull_rows = Launcher(move_triton.pull_rows_kernel)
_pull_scalars = Launcher(move_triton.pull_scalars_kernel)
_clear_padding = Launcher(move_triton.clear_padding_kernel)


def push_rows(
    source: Tensor | Indirect,
    address: Address,
    peers: Tensor,
    weights: Tensor | Indirect | None,
    peer_weights: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """`move.push_rows`, or into one buffer."""
    num_tokens, width = source.shape
    block = min(_PUSHED, next_power_of_2(width))
    tokens = _PUSHED // block
    _push_rows(
        (cdiv(num_tokens, tokens), 1, 1),
        _passed(source),
        address.host,
        address.row,
        peers,
        _passed(weights),
        peer_weights,
        num_tokens,
        width,
        LOCAL=_is_local(peers),
        INDIRECT=isinstance(source, Indirect),
        ELEMENT=_ELEMENT[source.dtype],
        WEIGHT=_weight(weights),
        DTYPE=_ELEMENT[dtype],
        TOP_K=address.row.shape[1],
        TOKENS=tokens,
        BLOCK=block,
    )


def pull_rows(
    address: Address,
    peers: Tensor,
    weights: Tensor | Indirect | None,
    out: Tensor | Indirect,
    dtype: torch.dtype,
) -> None:
    """`move.pull_rows`, or from one buffer."""
    num_tokens, width = out.shape
    block = min(_PULLED, next_power_of_2(width))
    tokens = _PUSHED // block
    _pull_rows(
        (cdiv(num_tokens, tokens), cdiv(width, block), 1),
        address.host,
        address.row,
        peers,
        _passed(weights),
        out.cell if isinstance(out, Indirect) else out,
        num_tokens,
        width,
        width if isinstance(out, Indirect) else out.stride(0),
        LOCAL=_is_local(peers),
        INDIRECT=isinstance(out, Indirect),
        ELEMENT=_ELEMENT[out.dtype],
        WEIGHT=_weight(weights),
        DTYPE=_ELEMENT[dtype],
        TOP_K=address.row.shape[1],
        TOKENS=tokens,
        BLOCK=block,
    )


def pull_scalars(address: Address, peers: Tensor, num_parts: int, part_stride: int, out: Tensor | Indirect) -> None:
    """`move.pull_scalars`, or from one buffer."""
    num_assignments = address.row.numel()
    _pull_scalars(
        (cdiv(num_assignments, _SCALARS), 1, 1),
        address.host,
        address.row,
        peers,
        out.cell if isinstance(out, Indirect) else out,
        num_assignments,
        num_parts,
        part_stride,
        LOCAL=_is_local(peers),
        INDIRECT=isinstance(out, Indirect),
        BLOCK=_SCALARS,
    )


def clear_padding(rows: Tensor, starts: Tensor, ends: Tensor) -> None:
    """`move.clear_padding`."""
    width = rows.shape[1]
    block = min(_PUSHED, next_power_of_2(width))
    grid = (_CLEARERS * ends.shape[0], 1, 1)
    _clear_padding(grid, rows, starts, ends, width, PARTS=_CLEARERS, BLOCK=block)


def _is_local(peers: Tensor) -> bool:
    """Addresses are int64, and no row is."""
    return peers.dtype != torch.int64


def _passed(tensor: Tensor | Indirect | None) -> Tensor | None:
    """What the kernel is given for it."""
    if isinstance(tensor, Indirect):
        return tensor.cell
    return None if tensor is None else tensor.contiguous()


def _weight(weights: Tensor | Indirect | None) -> Any:
    """The element that the kernel reads where weights are `Indirect`."""
    return tl.float32 if weights is None else _ELEMENT[weights.dtype]
