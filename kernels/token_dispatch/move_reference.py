"""Moving rows in plain torch, between tensors of one process. Waits for the device: an oracle, and what a CPU runs.

Shape legend: T tokens, k choices, d width of a row, N ranks, P rows of a buffer, R residents, n parts of a sum.
`peers` holds the tensors of all N ranks.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.token_dispatch.address import Address


def push_rows_reference(
    source: Tensor,
    address: Address,
    peers: list[Tensor],
    weights: Tensor | None = None,
    peer_weights: list[Tensor] | None = None,
) -> None:
    """`move.push_rows` of `source[T, d]` into the peers' `[P, d]` rows and `[P]` weights."""
    for host, rows in enumerate(peers):
        token, choice = torch.nonzero(address.host == host, as_tuple=True)
        row = address.row[token, choice].long()
        rows[row] = source[token]
        if weights is not None and peer_weights is not None:
            peer_weights[host][row] = weights[token, choice].float()


def pull_rows_reference(address: Address, peers: list[Tensor], weights: Tensor | None, out: Tensor) -> None:
    """`move.pull_rows` from the peers' `[P, d]` rows into `out[T, d]`."""
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for choice in range(address.row.shape[1]):
        value = torch.zeros_like(total)
        for host, rows in enumerate(peers):
            (token,) = torch.nonzero(address.host[:, choice] == host, as_tuple=True)
            value[token] = rows[address.row[token, choice].long()].float()
        total += value if weights is None else value * weights[:, choice, None].float()
    out.copy_(total)


def pull_scalars_reference(address: Address, peers: list[Tensor]) -> Tensor:
    """`move.pull_scalars` from the peers' `[n, P]` scalars: fp32 `[T, k]`."""
    out = torch.zeros(address.row.shape, dtype=torch.float32, device=address.row.device)
    for host, scalars in enumerate(peers):
        here = address.host == host
        for part in scalars:
            out[here] += part[address.row[here].long()]
    return out


def clear_padding_reference(rows: Tensor, starts: Tensor, ends: Tensor) -> None:
    """`move.clear_padding` of `rows[P, d]`."""
    row = torch.arange(rows.shape[0], device=rows.device)
    padding = ((row >= ends[:, None]) & (row < starts[1:, None])).any(dim=0)
    rows.masked_fill_(padding[:, None], 0)
