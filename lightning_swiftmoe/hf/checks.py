"""What an experts module of transformers holds, and what it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_swiftmoe.hf.activations import has_default_gate
from lightning_swiftmoe.kernels.dispatch import needs_dispatcher
from lightning_swiftmoe.layers.layer import INTERFACE_FLAGS

NAME = "swiftmoe"  # of our implementation
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Projections:
    """The weights of an experts module: `up [E, H, d]` and `down [E, d, h]`, or `[E, d, H]` and `[E, h, d]`."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None  # [E, H]
    down_bias: Tensor | None  # [E, d]
    transposed: bool
    has_post_norm: bool

    @classmethod
    def of(cls, experts: Any, tensors: Mapping[str, Any]) -> Projections:
        """Those among ``tensors``, by the names and in the layout that the module's class says; unchecked."""
        up, down, up_bias, down_bias = (*(tensors[name] for name in parameter_names(experts)), None, None)[:4]
        return cls(up, down, up_bias, down_bias, bool(experts.is_transposed), _has_post_norm(experts))

    @property
    def num_experts(self) -> int:
        """E of this process."""
        return self.up.shape[0]

    @property
    def width(self) -> int:
        """d."""
        return self.up.shape[1 if self.transposed else 2]

    @property
    def up_columns(self) -> int:
        """H."""
        return self.up.shape[2 if self.transposed else 1]

    @property
    def hidden(self) -> int:
        """h."""
        return self.down.shape[1 if self.transposed else 2]

    @property
    def are_plain(self) -> bool:
        """Whether nothing but an activation stands beside them, and they are laid out as our kernels want them."""
        return not self.transposed and not self.has_post_norm and self.up_bias is None


def parameter_names(experts: Any) -> tuple[str, ...]:
    """Up and down projection, and their biases where there are any: what has a part for each expert."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    biases = (f"{up_name}_bias", "down_proj_bias") if experts.has_bias else ()
    return up_name, "down_proj", *biases


def _has_post_norm(experts: Any) -> bool:
    return bool(getattr(experts, "has_post_expert_norm", False))  # newer than the interface


def projections(experts: Any) -> Projections:
    """The weights, by the names and in the layout that the interface gives them.

    Raises:
        ValueError: it is no experts module, it lacks what it says it has or has what nobody would use, or its weights
            are not whole tensors of floating dtype, or of shapes that do not fit each other.
    """
    missing = [flag for flag in INTERFACE_FLAGS if not hasattr(experts, flag)]
    if missing:
        raise _refusal(experts, f"no {', '.join(missing)}", "a class with @use_experts_implementation", "decorate it")
    if experts.has_gate and not experts.is_concatenated and has_default_gate(experts):
        got = "interleaved gate and up columns, and the default _apply_gate, which splits in halves"
        raise _refusal(experts, got, "an _apply_gate that takes them apart", "define it in the class")
    names = parameter_names(experts)
    wanted = [*names, "post_expert_norm"] if _has_post_norm(experts) else names
    lacking = [name for name in wanted if getattr(experts, name, None) is None]
    if lacking:
        raise _refusal(experts, f"no {', '.join(lacking)}", "what the decorator's arguments promise", "correct them")
    beside = [name for name in _tensors_of(experts) if name.startswith(names[:2]) and name not in names]
    if beside:
        fix = "take experts_implementation='eager' for this model"
        raise _refusal(experts, f"{', '.join(beside)}", f"nothing beside {', '.join(names)}", fix)
    tensors = {name: getattr(experts, name) for name in names}
    for name, tensor in tensors.items():
        _check_tensor(experts, name, tensor)
    found = Projections.of(experts, tensors)
    _check_shapes(experts, found, names)
    return found


def check_inputs(experts: Any, weights: Projections, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Shapes and dtypes of a call.

    Raises:
        ValueError: they do not fit the weights or each other.
    """
    check_choices(experts, weights.width, x, top_k_index, top_k_weights)
    check_dtypes(experts, weights, x)


def check_dtypes(experts: Any, weights: Projections, x: Tensor) -> None:
    """Of hidden states and weights.

    Raises:
        ValueError: they differ, and no autocast makes them the same.
    """
    cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weights.up.dtype)
    if x.dtype != weights.up.dtype and not cast:
        got = f"hidden_states of {x.dtype} and weights of {weights.up.dtype}"
        raise _refusal(experts, got, "one dtype", "cast one of them or use autocast")


def check_choices(experts: Any, width: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Shapes and dtypes of a call, whatever the weights are.

    Raises:
        ValueError: they do not fit each other.
    """
    if x.ndim != 2 or x.shape[1] != width:
        got, expected = f"hidden_states {tuple(x.shape)}", f"[T, {width}]"
        raise _refusal(experts, got, expected, "flatten batch and sequence")
    shape = top_k_index.shape
    if top_k_index.ndim != 2 or shape != top_k_weights.shape or shape[0] != x.shape[0]:
        got = f"top_k_index {tuple(shape)} and top_k_weights {tuple(top_k_weights.shape)}"
        raise _refusal(experts, got, f"both [{x.shape[0]}, k]", "hand over the chosen experts only")
    if top_k_index.dtype not in (torch.int32, torch.int64) or not top_k_weights.is_floating_point():
        got = f"top_k_index of {top_k_index.dtype} and top_k_weights of {top_k_weights.dtype}"
        raise _refusal(experts, got, "int32 or int64 and a floating dtype", "cast them")


def check_indices(experts: Any, num_experts: int, top_k_index: Tensor) -> None:
    """Only on CPU, and where there are values: elsewhere it would wait for the device.

    Raises:
        ValueError: an index outside `[-1, E]`.
    """
    if top_k_index.device.type != "cpu" or not top_k_index.numel() or needs_dispatcher(top_k_index):
        return
    low, high = (int(bound) for bound in top_k_index.aminmax())
    if low < -1 or high > num_experts:
        expected = f"0 to {num_experts - 1}, or -1 or {num_experts} for no expert"
        raise _refusal(experts, f"expert indices {low} to {high}", expected, "see what the router returns")


def _tensors_of(experts: Any) -> list[str]:
    """Names of the Parameters and buffers that lie in the module itself."""
    found = (*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False))
    return [name for name, _ in found]


def _check_tensor(experts: Any, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, DTensor):
        fix = "call the module that gathers it, as of FSDP, or load the model without a device mesh"
        raise _refusal(experts, f"{name} as a DTensor", "this process's own tensor", fix)
    if tensor.dtype not in _DTYPES:
        fix = "load the model without quantisation, or dequantise it"
        raise _refusal(experts, f"{name} of {tensor.dtype}", "fp64, fp32, bf16 or fp16", fix)


def _check_shapes(experts: Any, found: Projections, names: tuple[str, ...]) -> None:
    up, down = found.up, found.down
    fits = up.ndim == down.ndim == 3 and up.dtype == down.dtype and up.shape[0] == down.shape[0] > 0
    fits = fits and getattr(experts, "num_experts", up.shape[0]) == up.shape[0]
    if fits and not experts.has_gate:
        fits = found.up_columns == found.hidden
    elif fits and has_default_gate(experts):  # what another gate makes of H columns is its own business
        fits = found.up_columns == 2 * found.hidden
    if fits and found.up_bias is not None and found.down_bias is not None:
        out = down.shape[2 if found.transposed else 1]
        fits = found.up_bias.shape == (up.shape[0], found.up_columns) and found.down_bias.shape == (up.shape[0], out)
    if not fits:
        shapes = ", ".join(f"{name} {tuple(getattr(experts, name).shape)}" for name in names)
        got = f"{shapes}, {up.dtype} and {down.dtype}, num_experts={getattr(experts, 'num_experts', None)}"
        layout = "[E, d, H], [E, h, d]" if found.transposed else "[E, H, d], [E, d, h]"
        expected = f"{layout} of one dtype, H = {'2h' if experts.has_gate else 'h'}, and biases [E, H], [E, d]"
        raise _refusal(experts, got, expected, "see the decorator's is_transposed and has_gate")


def _refusal(experts: Any, got: str, expected: str, fix: str) -> ValueError:
    who = type(experts).__name__
    return ValueError(f"experts_implementation={NAME!r} cannot run {who}: got {got}, expected {expected}; {fix}")
