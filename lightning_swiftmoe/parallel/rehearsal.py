"""Compiles at set-up what training will launch, so that no step waits for a compiler.

A layer rehearses one forward and backward of nothing in particular. Where all its work is kernels of ours, their
launches are only noted, and everything noted is compiled in parallel; elsewhere the layer really runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from lightning_swiftmoe.kernels.dispatch import choose_path, runs_without_host
from lightning_swiftmoe.kernels.launch import Launch, recorded
from lightning_swiftmoe.kernels.warmup import compile_expert_kernels, compile_launches
from lightning_swiftmoe.layers.moe import MoE
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.setup import Parallelism

# No kernel is compiled for a number; only with so many may a rank have more rows than usual, which takes other kernels.
_TOKENS = 512

Context = Callable[[], AbstractContextManager[None]]


def compile_layers(
    layers: Iterable[ExpertLayer], parallelism: Parallelism, forward_context: Context, say: Callable[[str], None]
) -> None:
    """Compile the kernels of all layers. On several ranks collective, as a step is.

    Afterwards the engine has to be told that weights are stale and gradients are to be dropped.

    Args:
        layers: on the device, attached.
        parallelism: the ranks.
        forward_context: what forwards run in, such as autocast.
        say: takes a line for the user.
    """
    if parallelism.device.type != "cuda":
        return
    start = time.perf_counter()
    launches: list[Launch] = []
    num_compiled = 0
    seen: set[Hashable] = set()
    for layer in layers:
        for moe in layer.moes.values():
            if not isinstance(moe, MoE):  # of a model with a router of its own: its first step compiles
                continue
            kind = _kind(layer, moe)
            if kind in seen:
                continue
            seen.add(kind)
            with forward_context():
                dtype = _compute_dtype(moe)
                if parallelism.num_ranks == 1:
                    num_compiled += _compile_alone(moe, dtype, parallelism.device)
                    continue
                only_noted = parallelism.transport == "symmetric" and _is_ours(moe, dtype)
                with recorded() if only_noted else nullcontext([]) as noted:
                    for wanted in _input_dtypes(dtype):
                        rehearse(moe, wanted, parallelism.device)
                launches += noted
    num_compiled += compile_launches(launches, parallelism.device)
    if num_compiled:
        say(f"{num_compiled} kernels are ready after {time.perf_counter() - start:.0f} s; later runs find them on disk")


def _kind(layer: ExpertLayer, moe: MoE) -> Hashable:
    """Layers of one kind launch the same kernels."""
    parameters = tuple((key, param.shape, param.dtype) for key, param in moe.named_parameters())
    return layer.cluster, parameters, repr(moe), moe.router.score, moe.router.normalize_topk, moe.aux_loss_coef > 0


def _compute_dtype(moe: MoE) -> torch.dtype:
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return moe.router.weight.dtype


def _input_dtypes(dtype: torch.dtype) -> set[torch.dtype]:
    """What may arrive at a layer that computes in ``dtype``: under autocast also what a norm gives."""
    return {dtype, torch.float32} if torch.is_autocast_enabled("cuda") else {dtype}


def _is_ours(moe: MoE, dtype: torch.dtype) -> bool:
    """Whether nothing reads what our kernels wrote but our kernels: launches that are not made leave anything there."""
    experts = moe.experts
    device = moe.router.weight.device
    width, hidden = experts.down_proj.shape[1:]
    path = choose_path(device, dtype, width, hidden, moe.num_experts, experts.activation, "auto")
    return runs_without_host(path)


def _compile_alone(moe: MoE, dtype: torch.dtype, device: torch.device) -> int:
    width, hidden = moe.hidden_size, moe.experts.down_proj.shape[2]
    return compile_expert_kernels(
        width,
        hidden,
        moe.num_experts,
        moe.top_k,
        dtype,
        moe.experts.activation,
        device,
        score=moe.router.score,
        normalize=moe.router.normalize_topk,
        biased=moe.router.expert_bias is not None,
    )


def rehearse(moe: MoE, dtype: torch.dtype, device: torch.device) -> None:
    """One forward and backward, in this thread, that leaves nothing behind in the layer."""
    x = torch.zeros(_TOKENS, moe.hidden_size, dtype=dtype, device=device, requires_grad=True)
    was_training = moe.training
    moe.train()
    with torch.autograd.set_multithreading_enabled(False):
        y = moe(x)
        y.backward(torch.zeros_like(y))
    moe.train(was_training)
    moe.pop_load()
    moe.aux_loss = moe.z_loss = None
    for param in moe.parameters():
        param.grad = None
