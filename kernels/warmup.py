"""Compiling every kernel of a layer's training step at set-up, so that no step waits for a compiler.

The step runs on the meta device while launches are recorded instead of made: the code that will launch is the list of
what to compile. Triton compiles in threads and keeps the results on disk. What is compiled depends on a layer's sizes,
never on numbers of rows (`do_not_specialize`), so that one call for a layer shape is enough.

Shape legend: T tokens, k choices, E experts, R residents, d model width, h hidden width, H = 2h when gated, else h.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels import dispatch
from lightning_swiftmoe.kernels.activations import is_gated
from lightning_swiftmoe.kernels.launch import Launch, recorded
from lightning_swiftmoe.kernels.router import MOST_EXPERTS

Progress = Callable[[int, int, str], None]  # done, total, name of the kernel

_MOST_THREADS = 16
_WIDE_STEP = 2**28  # elements of rows beyond which products come in bands, see `padded_mlp`


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class LayerShape:
    """All that the kernels of a layer depend on."""

    width: int  # d
    hidden: int  # h
    num_experts: int  # E
    top_k: int  # k
    dtype: torch.dtype
    weights_dtype: torch.dtype  # of the gate weights
    activation: str
    path: str  # of `dispatch.choose_path`

    def projections(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """`up_proj` and `down_proj` of so many experts."""
        up_rows = self.hidden * (2 if is_gated(self.activation) else 1)
        up_proj = _meta(num_experts, up_rows, self.width, dtype=self.dtype)
        return up_proj, _meta(num_experts, self.width, self.hidden, dtype=self.dtype)


def run_expert_mlp(shape: LayerShape, num_tokens: int, tile: int) -> None:
    """Forward and backward of the one-process path, under `recorded`."""
    from lightning_swiftmoe.kernels import padded_mlp, padded_routing

    x = _meta(num_tokens, shape.width, dtype=shape.dtype)
    topk_idx = _meta(num_tokens, shape.top_k, dtype=torch.int64)
    weights = _meta(num_tokens, shape.top_k, dtype=shape.weights_dtype)
    projections = shape.projections(shape.num_experts)
    routing = padded_routing.route(topk_idx, shape.num_experts, tile)
    y, pre = padded_mlp.forward(x, weights, *projections, routing, shape.activation, shape.path)
    padded_mlp.backward(y, x, weights, *projections, pre, routing, shape.activation, shape.path, True, [True] * 4)


def run_rows_mlp(shape: LayerShape, num_residents: int, num_rows: int, tile: int) -> None:
    """Forward and backward over rows in place, under `recorded`."""
    from lightning_swiftmoe.kernels import rows_mlp
    from lightning_swiftmoe.kernels.row_layout import row_layout

    starts = _meta(num_residents + 1, dtype=torch.int32)
    ends = _meta(num_residents, dtype=torch.int32)
    rows = _meta(num_rows, shape.width, dtype=shape.dtype)
    row_weights = _meta(num_rows, dtype=torch.float32)
    projections = shape.projections(num_residents)
    layout = row_layout(starts, ends, num_rows, tile)
    if shape.path == "torch":
        return
    out, pre = rows_mlp.forward_rows(rows, *projections, layout, shape.activation, shape.path)
    rows_mlp.backward_rows(
        out, rows, row_weights, *projections, pre, layout, shape.activation, shape.path, True, [True] * 4
    )


def run_router(num_tokens: int, num_experts: int, top_k: int, score: str, normalize: bool, biased: bool) -> None:
    """Forward and backward of the router and its losses, under `recorded`."""
    from lightning_swiftmoe.kernels.router import (
        launch_auxiliary_losses,
        launch_route_tokens,
        launch_route_tokens_backward,
    )

    logits = _meta(num_tokens, num_experts, dtype=torch.float32)
    bias = _meta(num_experts, dtype=torch.float32) if biased else None
    topk_idx, weights, prob_sum, z_sum, counts = launch_route_tokens(logits, bias, top_k, score, normalize)
    launch_auxiliary_losses(prob_sum, z_sum, counts[None], top_k, 1)
    # With losses, and where none counts. Gradients are in memory of their own.
    gradients = (torch.empty_like(prob_sum), torch.empty_like(z_sum))
    launch_route_tokens_backward(logits, topk_idx, weights, *gradients, score, normalize)
    launch_route_tokens_backward(logits, topk_idx, weights, None, None, score, normalize)


def compile_launches(launches: list[Launch], device: torch.device, on_progress: Progress | None = None) -> int:
    """Compile what was recorded and is not compiled yet, and load it onto the device.

    Args:
        launches: from `recorded`.
        device: a CUDA device.
        on_progress: called after each kernel.

    Returns:
        How many kernels were compiled or came from the disk.
    """
    from triton import AsyncCompileMode, FutureKernel

    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with torch.cuda.device(device), ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool):
        pending: dict[int, tuple[str, Any]] = {}
        for launch in launches:
            kernel = launch.kernel.warmup(
                *launch.described(), grid=(1, 1, 1), num_warps=launch.num_warps, **launch.constants
            )
            # Launches that share a compiled form share the future; one that is compiled already has none.
            if isinstance(kernel, FutureKernel):
                pending[id(kernel)] = launch.name, kernel
        for done, (name, future) in enumerate(pending.values(), start=1):
            # `run` loads the code: doing so at the first launch would wait for the device.
            _ = future.result().run
            if on_progress is not None:
                on_progress(done, len(pending), name)
    return len(pending)


def record_layer(shape: LayerShape, num_residents: int | None, tile: int) -> list[Launch]:
    """Every launch of a layer's step, each compiled form at least once."""
    # Large products come in bands of columns, whose sum takes other constants.
    many_tokens = _WIDE_STEP // (shape.width * shape.top_k) + 1
    with recorded() as launches:
        if shape.path != "torch":
            run_expert_mlp(shape, 1, tile)
            run_expert_mlp(shape, many_tokens, tile)
        if num_residents is not None:
            run_rows_mlp(shape, num_residents, tile, tile)
    return launches


def compile_expert_kernels(
    width: int,
    hidden: int,
    num_residents: int | None,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    activation: str,
    device: torch.device,
    *,
    backend: str = "auto",
    weights_dtype: torch.dtype = torch.float32,
    score: str | None = "softmax",
    normalize: bool = False,
    biased: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Compile all that forward and backward of a layer will launch; a second call finds nothing to do.

    Args:
        width: d.
        hidden: h.
        num_residents: R of the rows that arrive from other ranks (`rows_mlp`), None if there are none.
        num_experts: E of the one-process path and of the router.
        top_k: k.
        dtype: of x and the projections.
        activation: one of `activation_names()`.
        device: where the layer runs; elsewhere than on CUDA there is nothing to compile.
        backend: as in `functional.expert_mlp`.
        weights_dtype: of the gate weights `[T, k]`.
        score: "softmax" or "sigmoid" of the router, None if the layer does not use ours.
        normalize: as in `functional.route_tokens`.
        biased: whether the router has a bias.
        on_progress: called after each kernel with how many are done, how many there are and its name.

    Returns:
        How many kernels were compiled or came from Triton's cache on disk.
    """
    if device.type != "cuda" or not dispatch.has_triton():
        return 0
    path = dispatch.choose_path(device, dtype, width, hidden, num_experts, activation, backend)
    shape = LayerShape(width, hidden, num_experts, top_k, dtype, weights_dtype, activation, path)
    launches = record_layer(shape, num_residents, dispatch.tile_rows(device))
    if score is not None and num_experts <= MOST_EXPERTS:
        with recorded() as routing:
            run_router(1, num_experts, top_k, score, normalize, biased)
        launches += routing
    return compile_launches(launches, device, on_progress)


def record_shard_moves(
    rows: Sequence[tuple[int, int]], num_ranks: int, compute_dtype: torch.dtype, grad_dtype: torch.dtype
) -> list[Launch]:
    """Every launch of the two exchanges of expert state.

    Args:
        rows: rows and columns of one expert's matrix, for each parameter.
        num_ranks: N.
        compute_dtype: of residents, and of weights on the wire.
        grad_dtype: of gradients on the wire.
    """
    from lightning_swiftmoe.kernels import expert_shards_triton as kernels

    bounds = [[min(rank * -(-r // num_ranks), r) * c for rank in range(num_ranks + 1)] for r, c in rows]
    index = _meta(1, dtype=torch.int64)
    with recorded() as launches:
        for k, (r, c) in enumerate(rows):
            grads, residents = _meta(1, r * c, dtype=grad_dtype), _meta(1, r * c, dtype=compute_dtype)
            shard = _meta(1, bounds[k][1], dtype=torch.float32)
            kernels.launch_wire(grads, grads, k, bounds, to_wire=True)
            kernels.launch_wire(residents, residents, k, bounds, to_wire=False)
            kernels.launch_gather(shard, index, residents, 0)
            kernels.launch_sum(grads, index, index, shard, 0, 1 / num_ranks)
    return launches
