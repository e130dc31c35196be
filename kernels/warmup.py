"""Compiling every kernel of a layer's training step at set-up, so that no step waits for a compiler.

The step runs on the meta device while launches are recorded instead of made: the code that will launch is the list of
what to compile. Triton compiles in threads and keeps the results on disk. What is compiled depends on a layer's sizes,
never on numbers of rows (`do_not_specialize`), so that one call for a layer shape is enough.

Shape legend: T tokens, k choices, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_swiftmoe.kernels import dispatch
from lightning_swiftmoe.kernels.expert_mlp.activations import is_gated
from lightning_swiftmoe.kernels.launch import Launch, recorded
from lightning_swiftmoe.kernels.router.route_tokens import MOST_EXPERTS

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
    from lightning_swiftmoe.kernels.expert_mlp import padded_mlp
    from lightning_swiftmoe.kernels.token_permute import padded_routing

    x = _meta(num_tokens, shape.width, dtype=shape.dtype)
    topk_idx = _meta(num_tokens, shape.top_k, dtype=torch.int64)
    weights = _meta(num_tokens, shape.top_k, dtype=shape.weights_dtype)
    projections = shape.projections(shape.num_experts)
    routing = padded_routing.route(topk_idx, shape.num_experts, tile)
    y, pre = padded_mlp.forward(x, weights, *projections, routing, shape.activation, shape.path)
    padded_mlp.backward(y, x, weights, *projections, pre, routing, shape.activation, shape.path, True, [True] * 4)


def run_router(num_tokens: int, num_experts: int, top_k: int, score: str, normalize: bool, biased: bool) -> None:
    """Forward and backward of the router and its losses, under `recorded`."""
    from lightning_swiftmoe.kernels.router.route_tokens import (
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


def record_layer(shape: LayerShape, tile: int) -> list[Launch]:
    """Every launch of a layer's step, each compiled form at least once."""
    # Large products come in bands of columns, whose sum takes other constants.
    many_tokens = _WIDE_STEP // (shape.width * shape.top_k) + 1
    with recorded() as launches:
        if shape.path != "torch":
            run_expert_mlp(shape, 1, tile)
            run_expert_mlp(shape, many_tokens, tile)
    return launches


def compile_expert_kernels(
    width: int,
    hidden: int,
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
    """Compile all that forward and backward of a layer will launch in one process; a second call finds nothing to do.

    Args:
        width: d.
        hidden: h.
        num_experts: E.
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
    launches = record_layer(shape, dispatch.tile_rows(device))
    if score is not None and num_experts <= MOST_EXPERTS:
        with recorded() as routing:
            run_router(1, num_experts, top_k, score, normalize, biased)
        launches += routing
    return compile_launches(launches, device, on_progress)
