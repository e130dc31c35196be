"""Moving rows between tokens and their places: in peers' memory, or in this process's send buffer.

Shape legend: T tokens, k choices, d width of a row, N ranks, P rows of a buffer, R residents, n parts of a sum.
`peers` is `[N]` int64 on the device: the raw address of every rank's buffer of rows, on a 16-byte boundary. Tensors of
this rank's tokens may be `Indirect`, all of a call or none.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import on_device, uses_triton
from lightning_swiftmoe.kernels.indirect import Indirect
from lightning_swiftmoe.kernels.token_dispatch import move_reference
from lightning_swiftmoe.kernels.token_dispatch.address import Address


def peer_addresses(buffer_ptrs: list[int], device: torch.device, offset_bytes: int = 0) -> Tensor:
    """`peers[N]` from the addresses of symmetric buffers. Copies to the device: call it at set-up.

    Args:
        buffer_ptrs: address of every rank's buffer, as a symmetric memory handle lists them.
        device: where the kernels will run.
        offset_bytes: of the rows inside each buffer.

    Raises:
        ValueError: if rows would not start on a 16-byte boundary.
    """
    addresses = [pointer + offset_bytes for pointer in buffer_ptrs]
    if any(address % 16 for address in addresses):
        raise ValueError(f"rows must start on a 16-byte boundary; those at offset {offset_bytes} do not")
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def push_rows(
    source: Tensor | Indirect,
    address: Address,
    peers: Tensor,
    weights: Tensor | Indirect | None = None,
    peer_weights: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write each row of `source[T, d]` to its k places at the peers, reading it once.

    Args:
        source: `[T, d]`.
        address: where the assignments go; dropped ones are not written.
        peers: `[N]` addresses of the peers' rows.
        weights: `[T, k]` one number for each assignment, such as its gate weight; or None.
        peer_weights: `[N]` addresses of the peers' `[P]` fp32 numbers, one for each row; with weights only.
        dtype: of the peers' rows, bf16, fp16 or fp32; None means that of source.

    Raises:
        ValueError: for weights without a place, or a place without weights.
    """
    if (weights is None) != (peer_weights is None):
        raise ValueError("weights and peer_weights come together; got only one of them")
    if source.numel() == 0:
        return
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(address.row):
        move_launch.push_rows(source, address, peers, weights, peer_weights, dtype or source.dtype)


def pull_rows(
    address: Address,
    peers: Tensor,
    weights: Tensor | Indirect | None,
    out: Tensor | Indirect,
    dtype: torch.dtype | None = None,
) -> None:
    """`out[t] = sum_j weights[t, j] * row[t, j]`, summed in fp32 in the order of j; dropped assignments add nothing.

    Args:
        address: where the rows are.
        peers: `[N]` addresses of the peers' rows.
        weights: `[T, k]`, or None for ones.
        out: `[T, d]` with contiguous rows; may be some columns of a wider tensor.
        dtype: of the peers' rows, bf16, fp16 or fp32; None means that of out.
    """
    if out.numel() == 0:
        return
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(address.row):
        move_launch.pull_rows(address, peers, weights, out, dtype or out.dtype)


def pull_scalars(
    address: Address, peers: Tensor, out: Tensor | Indirect, num_parts: int = 1, part_stride: int = 0
) -> None:
    """`out[t, j]`: each assignment's scalar at its row, zero where dropped.

    Args:
        address: where the scalars are.
        peers: `[N]` addresses of the peers' fp32 `[n, P]` scalars.
        out: `[T, k]` fp32, contiguous.
        num_parts: n; the parts are added in their order.
        part_stride: elements from one part to the next.
    """
    if out.numel() == 0:
        return
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(address.row):
        move_launch.pull_scalars(address, peers, num_parts, part_stride, out)


def pack_rows(source: Tensor, address: Address, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """`rows[num_rows, d]`, this rank's send buffer: row `address.row[t, j]` is `source[t]`; the others undefined.

    Args:
        source: `[T, d]`.
        address: of its rows.
        num_rows: of the buffer.
        dtype: of the buffer; None means that of source.
    """
    rows = source.new_empty(num_rows, source.shape[1], dtype=dtype)
    if source.numel() == 0:
        return rows
    if not uses_triton(source):
        move_reference.push_rows_reference(source.to(rows.dtype), _at_home(address), [rows])
        return rows
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(source):
        move_launch.push_rows(source, address, rows, None, None, rows.dtype)
    return rows


def unpack_rows(rows: Tensor, address: Address, weights: Tensor | None, out: Tensor) -> None:
    """`pull_rows` from `rows[P, d]` of this process."""
    if out.numel() == 0:
        return
    if not uses_triton(out):
        move_reference.pull_rows_reference(_at_home(address), [rows], weights, out)
        return
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(out):
        move_launch.pull_rows(address, rows.contiguous(), weights, out, rows.dtype)


def unpack_scalars(scalars: Tensor, address: Address) -> Tensor:
    """`pull_scalars` from fp32 `scalars[n, P]` of this process."""
    if not uses_triton(scalars) or address.row.numel() == 0:
        return move_reference.pull_scalars_reference(_at_home(address), [scalars])
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    out = torch.empty(address.row.shape, dtype=torch.float32, device=scalars.device)
    scalars = scalars.contiguous()
    with on_device(out):
        move_launch.pull_scalars(address, scalars, scalars.shape[0], scalars.stride(0), out)
    return out


def clear_padding(rows: Tensor, starts: Tensor, ends: Tensor) -> None:
    """Zero rows `[ends[r], starts[r + 1])` of `rows[P, d]` in place, for every resident r.

    Args:
        rows: `[P, d]`, contiguous.
        starts: `[R + 1]` int32.
        ends: `[R]` int32.
    """
    if not uses_triton(rows):
        move_reference.clear_padding_reference(rows, starts, ends)
        return
    from lightning_swiftmoe.kernels.token_dispatch import move_launch

    with on_device(rows):
        move_launch.clear_padding(rows, starts, ends)


def _at_home(address: Address) -> Address:
    """The same rows, all of one host: a send buffer holds rows for every host."""
    return Address(address.host.clamp_max(0), address.row)
