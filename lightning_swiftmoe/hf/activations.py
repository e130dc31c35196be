"""Which of our activations an experts module of transformers computes, if any."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from lightning_swiftmoe.hf._transformers import ACT2FN, use_experts_implementation

# Names of transformers and ours. Those that share a class compute the same, up to the last bits.
_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_CLASSES = {type(ACT2FN[name]): ours for name, ours in _NAMES.items()}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # torch.nn.GELU(approximate=...)
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@use_experts_implementation
class _Plain(nn.Module):
    """A class without a gate of its own, to which transformers gives its default: so we know it when we see it."""

    def forward(self) -> None:
        """Never called."""


_DEFAULT_GATE = _Plain._apply_gate  # type: ignore[attr-defined]


def has_default_gate(experts: Any) -> bool:
    """Whether the gate is ``act_fn(gate) * up`` of two halves, gate first."""
    return type(experts)._apply_gate is _DEFAULT_GATE and "_apply_gate" not in vars(experts)


def fused_activation(experts: Any) -> str | None:
    """Our name for what stands between the projections, or None where only the module itself can compute it.

    Args:
        experts: a module with transformers' experts interface.

    Returns:
        One of ``lightning_swiftmoe.functional.activation_names()``; None for another function, a gate of the class's
        own, or hooks that want to see the function called.
    """
    if experts.has_gate and not has_default_gate(experts):
        return None
    name = _elementwise(getattr(experts, "act_fn", None))
    return _GATED.get(name) if experts.has_gate and name is not None else name


def _elementwise(function: Any) -> str | None:
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function)
    if "forward" in vars(function) or any(getattr(function, hooks) for hooks in _HOOKS):
        return None
    if type(function) is nn.GELU:
        return _GELUS.get(function.approximate)
    return _CLASSES.get(type(function))
