"""Compiling every kernel of a layer's training step at set-up, so that no step waits for a compiler.

The step runs on the meta device while launches are recorded instead of made: the code that will launch is the list of
what to compile. Triton compiles in threads and keeps the results on disk. What is compiled depends on a layer's sizes,
never on numbers of rows (`do_not_specialize`), so that one call for a layer shape is enough.

Shape legend: T tokens, k choices, E experts, R residents, d model width, h hidden width, H = 2h when gated, else h.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels import dispatch
from lightning_swiftmoe.kernels.activations import is_gated
from lightning_swiftmoe.kernels.router import MOST_EXPERTS

Progress = Callable[[int, int, str], None]  # done, total, name of the kernel

_MOST_THREADS = 16
_WIDE_STEP = 2**28  # elements of rows beyond which products come in bands, see `padded_mlp`


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for and not made."""

    kernel: Any
    args: tuple[Any, ...]
    num_warps: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    def described(self) -> list[Any]:
        """The arguments as Triton takes them."""
        from lightning_swiftmoe.kernels.launch import Box

        return [a.descriptor() if isinstance(a, Box) else a for a in self.args]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of this thread go into the list that the context gives, and are not made; for set-up only."""
    from lightning_swiftmoe.kernels.launch import Launcher

    launch, thread = Launcher.__call__, threading.get_ident()
    launches: list[Launch] = []

    def record(self: Any, grid: tuple[int, int, int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        if threading.get_ident() != thread:
            return launch(self, grid, *args, num_warps=num_warps, **constants)
        launches.append(Launch(self._kernel, args, num_warps, constants))
        return None

    Launcher.__call__ = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Launcher.__call__ = launch  # type: ignore[method-assign]


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
    """Forward and backward of the router, under `recorded`."""
    from lightning_swiftmoe.kernels.router import launch_route_tokens, launch_route_tokens_backward

    logits = _meta(num_tokens, num_experts, dtype=torch.float32)
    bias = _meta(num_experts, dtype=torch.float32) if biased else None
    topk_idx, weights, prob_sum, z_sum, _ = launch_route_tokens(logits, bias, top_k, score, normalize)
    launch_route_tokens_backward(logits, topk_idx, weights, prob_sum, z_sum, score, normalize)


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


def compile_shard_kernels(
    num_elements: int,
    num_ranks: int,
    device: torch.device,
    *,
    grad_dtype: torch.dtype,
    wire_dtype: torch.dtype,
    sum_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype,
) -> None:
    """Launch the shard moves of one expert of so many elements: `pack_shards`, `sum_shards` and `place_shards`.

    Gradients go from grad_dtype over wire_dtype to sum_dtype, weights from wire_dtype to weight_dtype.
    """
    from lightning_swiftmoe.kernels import shards

    grads = torch.zeros(1, num_elements, dtype=grad_dtype, device=device)
    blocks = shards.pack_shards(grads, num_ranks, wire_dtype)
    expert_ids = torch.zeros(num_ranks, dtype=torch.int64, device=device)
    shards.sum_shards(blocks.squeeze(1), expert_ids, 1, sum_dtype)
    shards.place_shards(blocks, num_elements, weight_dtype)
