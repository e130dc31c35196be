"""The expert MLPs that a user could pick instead of ours, each a function of the same five tensors.

Shape legend: T tokens, k choices, R = T * k, E experts, d model width, h hidden width, H = 2h when gated, else h.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_swiftmoe.functional import expert_mlp, is_gated
from lightning_swiftmoe.kernels.expert_mlp.activations import elementwise_name

ExpertMLP = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


def ours(activation: str, backend: str = "auto") -> ExpertMLP:
    """Our own."""
    return lambda x, idx, weights, up, down: expert_mlp(x, idx, weights, up, down, activation, backend)  # type: ignore[arg-type]


def eager(activation: str) -> ExpertMLP:
    """What one writes on top of torch: argsort, gather, `grouped_mm`, activation, `grouped_mm`, weighted sum."""
    act = _ELEMENTWISE[elementwise_name(activation)]

    def run(x: Tensor, idx: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order = idx.reshape(-1).argsort(stable=True)
        counts = torch.zeros(up.shape[0], dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, idx.reshape(-1), torch.ones_like(idx.reshape(-1)))
        ends = counts.cumsum(0).to(torch.int32)
        pre = F.grouped_mm(x[order // idx.shape[1]], up.mT, offs=ends)
        if is_gated(activation):
            gate, linear = pre.chunk(2, dim=-1)
            hidden = act(gate) * linear
        else:
            hidden = act(pre)
        rows = F.grouped_mm(hidden, down.mT, offs=ends)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        return (rows[inverse].view(*idx.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    return run


def compiled(activation: str) -> ExpertMLP:
    """The same under `torch.compile`."""
    torch._dynamo.reset()  # one code object serves every shape, and its recompilations are limited
    return torch.compile(eager(activation), dynamic=False)


def transformers(activation: str) -> ExpertMLP:
    """`grouped_mm_experts_forward` of Hugging Face transformers v5; gated activations only."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    if not is_gated(activation):
        raise ValueError("gated activations only")
    act = _ELEMENTWISE[elementwise_name(activation)]

    def gate(pre: Tensor) -> Tensor:
        left, right = pre.chunk(2, dim=-1)
        return act(left) * right

    def run(x: Tensor, idx: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        layer = SimpleNamespace(
            gate_up_proj=up,
            down_proj=down,
            act_fn=act,
            _apply_gate=gate,
            num_experts=up.shape[0],
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            is_concatenated=True,
            has_post_expert_norm=False,
            _is_expert_parallel=False,
        )
        return grouped_mm_experts_forward(layer, x, idx, weights)

    return run


PEERS: dict[str, Callable[[str], ExpertMLP]] = {"eager": eager, "compiled": compiled, "transformers": transformers}
