"""The expert MLP over rows that stand in expert order already: no gather before it, no combine after it.

Rows arrive from other ranks in their place and results are fetched from theirs, so gate weights are applied where the
token lives: `out` here is unweighted, and so is the gradient that comes back.

Shape legend: P rows of a `RowLayout`, R residents, d model width, h hidden width, H = 2h when gated, else h.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import gemms
from lightning_swiftmoe.kernels.expert_mlp.row_layout import RowLayout


@dataclass(frozen=True, slots=True)
class HiddenGradients:
    """What the weight gradients need of the first half of the backward."""

    grad_pre: Tensor  # [P, H], gate weights included
    scaled_hidden: Tensor  # [P, h], hidden values times gate weights


@dataclass(frozen=True, slots=True)
class Spill:
    """Rows that may come but seldom do: their pre-activations are not kept, the backward computes them once more.

    Args:
        kept: layout of the first rows, whose pre-activations are.
        rest: layout of all others, counted from the first of them.
        memory: `[P, H]` for one forward or backward at a time.
    """

    kept: RowLayout
    rest: RowLayout
    memory: Tensor

    @property
    def num_kept(self) -> int:
        """Rows, used or not, before the rest."""
        return self.kept.allocated_rows

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of all rows, those that are kept and the rest."""
        return slice(self.num_kept), slice(self.num_kept, None)


def _check_out(name: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """A buffer must be one that a GEMM can write as if it had allocated it."""
    if out is None:
        return
    if out.shape != shape or out.dtype != like.dtype or not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(
            f"{name} must be a contiguous {like.dtype} tensor {shape} on a 16-byte boundary, got {out.dtype} "
            f"{tuple(out.shape)} with strides {out.stride()} at offset {out.data_ptr() % 16}"
        )


def _check_rows(name: str, rows: Tensor, layout: RowLayout, width: int) -> None:
    _check_out(name, rows, (layout.allocated_rows, width), rows)


def forward_rows(
    rows: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    layout: RowLayout,
    activation: str,
    path: str,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    spill: Spill | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row through its resident's MLP.

    Args:
        rows: `[P, d]`, zeros in the padding.
        up_proj: `[R, H, d]`, gate rows first when gated.
        down_proj: `[R, d, h]`.
        layout: where the rows of each resident stand.
        activation: one of `activation_names()`.
        path: "hopper", "triton", "grouped_mm" or "torch"; see `dispatch.choose_path`.
        out: `[P, d]`, where the results go; allocated if None. Written by the GEMM, except on path "grouped_mm",
            whose GEMM allocates and is copied.
        workspace: `[P, h]` for hidden values, which nobody needs afterwards; a path may allocate its own.
        spill: of which rows no pre-activations are wanted; with a workspace.

    Returns:
        `out[P, d]`, without gate weights, and the pre-activations `pre[P, H]`, or those of the rows that are kept.
        Padding rows are zeros; at and beyond `num_rows` both hold anything.
    """
    _check_rows("rows", rows, layout, down_proj.shape[1])
    _check_out("out", out, tuple(rows.shape), rows)
    gemm = gemms(path)
    if spill is None:
        pre, hidden = gemm.up_gemm(rows, up_proj, layout, activation, workspace)
    else:
        hidden = _memory_for_hidden(workspace)
        kept, rest = spill.slices
        pre = _up_to_place(gemm, rows[kept], up_proj, spill.kept, activation, hidden[kept])
        _up_to_place(gemm, rows[rest], up_proj, spill.rest, activation, hidden[rest], spill.memory[rest])
    return gemm.rows_gemm(hidden, down_proj, layout, True, out), pre


def _memory_for_hidden(workspace: Tensor | None) -> Tensor:
    if workspace is None:
        raise ValueError("rows in two parts need a workspace, where their hidden values stand in one piece")
    return workspace


def _up_to_place(
    gemm: ModuleType,
    rows: Tensor,
    up_proj: Tensor,
    layout: RowLayout,
    activation: str,
    hidden: Tensor,
    pre: Tensor | None = None,
) -> Tensor:
    """`up_gemm` whose hidden values come to `hidden` in any case; its pre-activations."""
    pre, values = gemm.up_gemm(rows, up_proj, layout, activation, hidden, pre)
    _moved(values, hidden)
    return pre


def _moved(result: Tensor, place: Tensor) -> None:
    """A result to its place, where a GEMM had memory of its own for it."""
    if result.data_ptr() != place.data_ptr():
        place.copy_(result)


def input_gradients(
    grad_rows: Tensor,
    row_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    layout: RowLayout,
    activation: str,
    path: str,
    overwrite_pre: bool,
    wanted: bool = True,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    rows: Tensor | None = None,
    spill: Spill | None = None,
) -> tuple[Tensor | None, Tensor, HiddenGradients]:
    """The half of the backward that other ranks wait for; see `backward_rows`.

    `workspace [P, h]` may take the hidden values, which `weight_gradients` needs. With the `spill` of the forward,
    `pre` is that of the rows that are kept, and `rows [P, d]` are needed.

    Returns:
        Gradients of rows, `[P, d]` or None if not wanted, and of row_weights, `[P]`; and what `weight_gradients` takes.
    """
    _check_rows("grad_rows", grad_rows, layout, down_proj.shape[1])
    _check_out("out_grad_rows", out, tuple(grad_rows.shape), grad_rows)
    gemm = gemms(path)
    if spill is None:
        grad_pre, scaled_hidden, partials = gemm.hidden_grad_gemm(
            grad_rows, down_proj, pre, row_weights, layout, activation, pre if overwrite_pre else None, workspace
        )
        grad_row_weights = _sum_partials(partials, layout)
    else:
        assert rows is not None
        grad_pre, scaled_hidden = spill.memory, _memory_for_hidden(workspace)
        kept, rest = spill.slices
        pre_of_rest = _up_to_place(
            gemm, rows[rest], up_proj, spill.rest, activation, scaled_hidden[rest], spill.memory[rest]
        )
        sums = []
        for part, part_layout, part_pre in ((kept, spill.kept, pre), (rest, spill.rest, pre_of_rest)):
            grads, hidden, partials = gemm.hidden_grad_gemm(
                grad_rows[part], down_proj, part_pre, row_weights[part], part_layout, activation, grad_pre[part],
                scaled_hidden[part],
            )  # fmt: skip
            _moved(grads, grad_pre[part])
            _moved(hidden, scaled_hidden[part])
            sums.append(_sum_partials(partials, part_layout))
        grad_row_weights = torch.cat(sums)
    grad_x = gemm.rows_gemm(grad_pre, up_proj, layout, False, out) if wanted else None
    return grad_x, grad_row_weights, HiddenGradients(grad_pre, scaled_hidden)


def _sum_partials(partials: Tensor, layout: RowLayout) -> Tensor:
    """`[P]` from `partials[n, P]`."""
    if partials.shape[0] == 1:
        return partials[0]
    from lightning_swiftmoe.kernels.token_permute.rows import sum_partials

    return sum_partials(partials, layout)


def weight_gradients(
    grad_rows: Tensor,
    rows: Tensor | None,
    hidden: HiddenGradients,
    layout: RowLayout,
    path: str,
    wanted_up: bool = True,
    wanted_down: bool = True,
    out_up: Tensor | None = None,
    out_down: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The half of the backward that can run while gradients of rows travel: `[R, H, d]` and `[R, d, h]`.

    Rows may be None where the first is not wanted.
    """
    num_residents, width = layout.ends.shape[0], grad_rows.shape[1]
    _check_rows("grad_rows", grad_rows, layout, width)
    _check_out("out_grad_up", out_up, (num_residents, hidden.grad_pre.shape[1], width), grad_rows)
    _check_out("out_grad_down", out_down, (num_residents, width, hidden.scaled_hidden.shape[1]), grad_rows)
    gemm = gemms(path)
    grad_up = grad_down = None
    if wanted_down:
        grad_down = gemm.weight_gemm(grad_rows, hidden.scaled_hidden, layout, in_token_order="left", out=out_down)
    if wanted_up:
        assert rows is not None
        _check_rows("rows", rows, layout, width)
        grad_up = gemm.weight_gemm(hidden.grad_pre, rows, layout, in_token_order="right", out=out_up)
    return grad_up, grad_down


def backward_rows(
    grad_rows: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    layout: RowLayout,
    activation: str,
    path: str,
    overwrite_pre: bool,
    wanted: Sequence[bool],
    out_grad_rows: Tensor | None = None,
    out_grad_up: Tensor | None = None,
    out_grad_down: Tensor | None = None,
    workspace: Tensor | None = None,
    spill: Spill | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of rows, row_weights, up_proj and down_proj.

    Args:
        grad_rows: `[P, d]`: at a row the gradient of its token's y, not multiplied by the gate weight; zeros in the
            padding.
        rows: `[P, d]` as in the forward.
        row_weights: `[P]` gate weights, fp32 (fp64 for fp64); anything in the padding.
        pre: `[P, H]` from the forward. With `overwrite_pre` it holds anything afterwards.
        wanted: which of the four gradients somebody needs; those that take a product of their own are None otherwise.
        out_grad_rows: `[P, d]` buffer for the first; it must not be `rows` or `grad_rows`.
        out_grad_up: `[R, H, d]` buffer.
        out_grad_down: `[R, d, h]` buffer.
        workspace: `[P, h]`; see `input_gradients`.
        spill: of the forward.

    Returns:
        `[P, d]`, `[P]` in fp32 (fp64 for fp64), `[R, H, d]` and `[R, d, h]`. The first two are zeros in the padding and
        anything at and beyond `num_rows`; the weights of residents without rows have zero gradients.
    """
    grad_x, grad_row_weights, hidden = input_gradients(
        grad_rows, row_weights, up_proj, down_proj, pre, layout, activation, path, overwrite_pre, wanted[0],
        out_grad_rows, workspace, rows, spill,
    )  # fmt: skip
    grad_up, grad_down = weight_gradients(
        grad_rows, rows, hidden, layout, path, wanted[2], wanted[3], out_grad_up, out_grad_down
    )
    return grad_x, grad_row_weights, grad_up, grad_down
