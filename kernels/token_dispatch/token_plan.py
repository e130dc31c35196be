"""What a plan of tokens needs to know and what it says.

Shape legend: N ranks, E experts, R residents that a rank may have at most, copies included, M copies at most, P rows of
the padded layout (whole tiles), A rows that the arrival buffer can hold. An assignment's number p counts the
assignments of its expert on its rank in batch order; the kept ones are p < kept[e].
"""

import struct
from dataclasses import dataclass

from torch import Tensor

LAYOUTS = ("padded", "packed")
SCOPES = ("cluster", "rank", "pooled")
# Fair shares are rounded to six decimals before they are rounded up: 1.1 * 100 / 10 is 11.000000000000002.
ROUNDING = 5e-7


@dataclass(frozen=True)
class Capacity:
    """How many assignments an expert or a rank may process; the device twin of `placement.TokenRule`.

    Args:
        factor: 1.0 gives every slot exactly its fair share.
        num_slots: `N * s`, the slots of the whole cluster.
        scope: "cluster" counts an expert's capacity over all ranks, "rank" on each alone; "pooled" counts a rank's.

    Raises:
        ValueError: for a scope that does not exist or a factor that is not positive.
    """

    factor: float
    num_slots: int
    scope: str = "cluster"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"capacity scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if not self.factor > 0:
            raise ValueError(f"capacity factor must be positive, got {self.factor!r}")

    @property
    def factor_bits(self) -> int:
        """The factor's fp64 pattern: Triton would hand a float to a kernel as fp32."""
        return struct.unpack("<q", struct.pack("<d", self.factor))[0]


@dataclass(frozen=True)
class Turns:
    """Of experts in the exact split, on the device.

    Args:
        table: `[C or more, 3, N]` int32 of `placement.exact_split.turn_table`.
        number: `[1]` int32, C.
    """

    table: Tensor
    number: Tensor


@dataclass(frozen=True)
class PlanSize:
    """What is known on the host before any token is routed.

    Args:
        max_residents: R, at most the slots of a rank, and the copies.
        max_rows: P, rows of this rank's padded layout, a multiple of the tile; the same on every rank.
        tile: rows to which every resident is padded.
        layout: "padded": rows travel straight to their place in the host's padded layout. "packed": rows travel in
            send order and arrive by source rank, then expert; the padded layout gathers them.
        max_arrivals: A, rows of the arrival buffer of the packed layout; the padded layout has none.
        max_copies: M, how many of the residents are copies that a rank borrows, at most; with an exact split.
        least_copied: assignments that a copy must take over.

    Raises:
        ValueError: for an unknown layout, rows that are not whole tiles, missing arrivals, or nothing but copies.
    """

    max_residents: int
    max_rows: int
    tile: int = 128
    layout: str = "padded"
    max_arrivals: int = 0
    max_copies: int = 0
    least_copied: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if not 0 <= self.max_copies < self.max_residents:
            raise ValueError(
                f"max_residents must be at least 1 and more than max_copies, got {self.max_residents} and "
                f"{self.max_copies}"
            )
        if self.max_rows < self.tile or self.max_rows % self.tile:
            raise ValueError(f"max_rows must be whole tiles of {self.tile} rows, got {self.max_rows}")
        if (self.layout == "packed") != (self.max_arrivals > 0):
            raise ValueError(f"max_arrivals belongs to the packed layout, got {self.max_arrivals} for {self.layout}")


@dataclass(frozen=True)
class TokenPlan:
    """One rank's part of a dispatch. All tensors are on the device; int32 unless said otherwise.

    Assignment p of expert e goes to host j with `send_until[j, e] <= p < send_until[j, e] + send[j, e]`, to row
    `base[j, e] + p`: of the host's padded layout, or of this rank's send buffer when the layout is packed. Send order
    is by host, then expert, then p; arrival order by source, then expert, then p.

    As a host: rows `[starts[r], ends[r])` of the padded layout are real and belong to resident r; up to `starts[r + 1]`
    they are padding. Inside a resident they stand by source rank, then p. `order` and `inverse` tie this layout to
    what arrives, as in a `PaddedRouting` of A tokens with k = 1. In the padded layout rows arrive where they belong:
    A = P, and both are the row itself.

    Starts and ends never go beyond P, whatever the counts; `needed_rows` tells whether they would have.
    """

    rank: int
    size: PlanSize
    kept: Tensor  # [E]: assignments this rank keeps
    send: Tensor  # [N, E]: of them, how many go to each host
    recv: Tensor  # [N, E]: how many arrive from each source
    send_until: Tensor  # [N, E]: how many go to hosts before this one
    base: Tensor  # [N, E]: row of assignment number zero, were it to go to this host; may be negative
    rank_load: Tensor  # [N] int64: assignments that every rank processes
    send_rows: Tensor  # [N] int64: send, summed over experts
    recv_rows: Tensor  # [N] int64: recv, summed over experts
    needed_rows: Tensor  # [N] int64: padded rows that every rank needs; more than P means rows without a place
    residents: Tensor  # [R]: this rank's experts, ascending, then from R - M on its copies; -1 where it has fewer
    starts: Tensor  # [R + 1]
    ends: Tensor  # [R]; residents that do not exist are empty
    tile_expert: Tensor  # [P / tile]: resident of each tile; R - 1 beyond the rows in use
    order: Tensor  # [P]: the arrival that stands in the row, -1 in the padding and beyond
    inverse: Tensor  # [A]: the row of the arrival, -1 where none arrived
    copies: Tensor  # [N, M]: experts that every rank borrows, the largest part first; -1 for none
    lenders: Tensor  # [N, M]: the host that lends each

    @property
    def num_rows(self) -> Tensor:
        """`[1]`: rows of the padded layout in use, padding included."""
        return self.starts[-1:]
