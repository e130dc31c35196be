"""Rows in place and what an MLP over them must give: a loop over residents through torch's autograd, in fp64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.expert_mlp import rows_mlp
from lightning_swiftmoe.kernels.expert_mlp.activations import activation_forward, is_gated
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout, row_layout
from lightning_swiftmoe.kernels.warmup import LayerShape

SPARE_TILES = 2  # allocated beyond the rows in use


def check_same_layout(got: RowLayout, want: RowLayout) -> None:
    """Everything that is defined."""
    used_tiles = int(want.num_rows) // want.tile
    for name in ("starts", "ends", "order", "num_rows"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(got.tile_expert[:used_tiles], want.tile_expert[:used_tiles])


@dataclass
class Case:
    """Inputs of `rows_mlp`, beyond `num_rows` filled with NaN."""

    layout: RowLayout
    rows: Tensor
    row_weights: Tensor
    grad_rows: Tensor
    up_proj: Tensor
    down_proj: Tensor


def make_layout(counts: list[int], tile: int, device: torch.device | str = "cpu") -> RowLayout:
    """The layout in which resident r has `counts[r]` rows."""
    starts, ends = [0], []
    for count in counts:
        ends.append(starts[-1] + count)
        starts.append(starts[-1] + -(-count // tile) * tile)
    bounds = [torch.tensor(bound, dtype=torch.int32, device=device) for bound in (starts, ends)]
    return row_layout(*bounds, starts[-1] + SPARE_TILES * tile, tile)


def make_case(
    counts: list[int], width: int, hidden: int, activation: str, tile: int, dtype: torch.dtype, device: str = "cpu"
) -> Case:
    layout = make_layout(counts, tile, device)
    rng = torch.Generator(device=device).manual_seed(sum(counts) + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=rng)

    def rows_like() -> Tensor:
        rows = random(layout.allocated_rows, width)
        rows[layout.order < 0] = 0
        rows[int(layout.num_rows) :] = float("nan")
        return rows.to(dtype)

    up_rows = hidden * (2 if is_gated(activation) else 1)
    weights = random(layout.allocated_rows).abs()
    return Case(
        layout,
        rows_like(),
        weights.to(torch.promote_types(dtype, torch.float32)),
        rows_like(),
        (random(len(counts), up_rows, width) / width**0.5).to(dtype),
        (random(len(counts), width, hidden) / hidden**0.5).to(dtype),
    )


def loop_over_residents(case: Case, activation: str) -> list[Tensor]:
    """`out`, and gradients of rows, row_weights, up_proj and down_proj; zeros outside the real rows."""
    leaves = [t.double().requires_grad_() for t in (case.rows, case.row_weights, case.up_proj, case.down_proj)]
    rows, weights, up, down = leaves
    out = torch.zeros_like(rows)
    loss = rows.new_zeros(())
    for resident, (start, end) in enumerate(zip(case.layout.starts.tolist(), case.layout.ends.tolist(), strict=False)):
        hidden = activation_forward(rows[start:end] @ up[resident].T, activation)
        y = hidden @ down[resident].T
        out[start:end] = y.detach()
        loss = loss + (weights[start:end, None] * y * case.grad_rows[start:end].double()).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]


def spill_behind(case: Case, tiles: int) -> tuple[Tensor, rows_mlp.Spill]:
    """A workspace, and the spill that keeps what belongs to the first tiles; both hold NaN."""
    layout = case.layout
    kept = tiles * layout.tile
    parts = [
        row_layout(layout.starts, layout.ends, rows, layout.tile, first)
        for rows, first in ((kept, 0), (layout.allocated_rows - kept, kept))
    ]
    workspace, memory = (
        case.rows.new_full((layout.allocated_rows, width), float("nan"))
        for width in (case.down_proj.shape[2], case.up_proj.shape[1])
    )
    return workspace, rows_mlp.Spill(*parts, memory)


def run_rows(
    case: Case, activation: str, path: str, buffers: bool = False, kept_tiles: int | None = None
) -> list[Tensor]:
    """Everything forward and backward give.

    Args:
        case: inputs.
        activation: of the experts.
        path: of the products.
        buffers: results go to buffers filled with NaN.
        kept_tiles: of so many tiles pre-activations are kept; None: of all.
    """

    def buffer(like: Tensor) -> Tensor | None:
        return torch.full_like(like, float("nan")) if buffers else None

    outs = [buffer(case.rows), buffer(case.rows), buffer(case.up_proj), buffer(case.down_proj)]
    weights = case.up_proj, case.down_proj
    workspace, spill = (None, None) if kept_tiles is None else spill_behind(case, kept_tiles)
    out, pre = rows_mlp.forward_rows(case.rows, *weights, case.layout, activation, path, outs[0], workspace, spill)
    if spill is not None:
        assert pre.shape[0] == spill.num_kept
        spill.memory.fill_(float("nan"))  # other layers use it between a forward and its backward
        workspace.fill_(float("nan"))
    grads = rows_mlp.backward_rows(
        case.grad_rows, case.rows, case.row_weights, *weights, pre, case.layout, activation, path, True, [True] * 4,
        *outs[1:], workspace, spill,
    )  # fmt: skip
    if buffers:
        assert all(given is got for given, got in zip(outs, (out, grads[0], *grads[2:]), strict=True))
    return [out, *grads]


def relative_errors(got: list[Tensor], want: list[Tensor], num_rows: int) -> list[float]:
    """Of each result, the first three being rows of which `num_rows` are in use."""
    errors = []
    for at, (result, wanted) in enumerate(zip(got, want, strict=True)):
        used = slice(num_rows if at < 3 else None)
        difference = (result[used].double() - wanted[used]).norm()
        errors.append(float(difference / wanted[used].norm().clamp_min(1e-30)))
    return errors


def launch_rows(shape: LayerShape, num_residents: int, num_rows: int, tile: int) -> None:
    """Forward and backward over rows in place, on the meta device: under `recorded`."""
    if shape.path == "torch":
        return

    def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    ends = empty(num_residents, dtype=torch.int32)
    layout = row_layout(empty(num_residents + 1, dtype=torch.int32), ends, num_rows, tile)
    rows, weights = empty(num_rows, shape.width, dtype=shape.dtype), empty(num_rows, dtype=torch.float32)
    matrices = shape.projections(num_residents)
    hidden = empty(num_rows, shape.hidden, dtype=shape.dtype)
    out, pre = rows_mlp.forward_rows(rows, *matrices, layout, shape.activation, shape.path, workspace=hidden)
    rows_mlp.backward_rows(out, rows, weights, *matrices, pre, layout, shape.activation, shape.path, True, [True] * 4)
