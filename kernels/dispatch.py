"""Which path runs an expert MLP. Every rule here was measured; see `docs/results/kernels.md`.

The paths: "hopper" (our warp-specialised GEMMs), "grouped_mm" (torch's grouped GEMM between our row kernels), "triton"
(portable Triton GEMMs) and "torch" (plain torch, any device and dtype).
"""

import functools
import importlib
import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_swiftmoe.kernels.expert_mlp.activations import is_gated

_NARROW = (torch.bfloat16, torch.float16)
_GEMMS = {"hopper": "hopper", "triton": "portable", "grouped_mm": "library", "torch": "plain"}
_INTERPRETER_TILE = 16  # the smallest `tl.dot`: interpreted tests pay for every padded row


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    """Whether Triton can be imported: it exists for Linux only."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton runs on this tensor's device; plain torch does otherwise."""
    return has_triton() and (tensor.device.type == "cuda" or interpreted())


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether something must see the op as an op: a compiler, a dispatch mode or a tensor subclass."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)


def on_device(tensor: Tensor) -> Any:
    """A context in which Triton launches on the tensor's device, which need not be the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream's work goes into a CUDA graph instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for either."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def hopper_supports(device: torch.device, dtype: torch.dtype, width: int, hidden: int, activation: str) -> bool:
    """Whether the Hopper GEMMs take these sizes: whole depth blocks of 64, gated halves in whole tiles of 128."""
    if device.type != "cuda" or dtype not in _NARROW or torch.version.hip:
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return width % 64 == 0 and hidden % (128 if is_gated(activation) else 64) == 0


def runs_without_host(path: str) -> bool:
    """Whether bounds of experts are read on the device alone; plain torch reads them on the host."""
    return path != "torch"


def choose_path(
    device: torch.device, dtype: torch.dtype, width: int, hidden: int, num_experts: int, activation: str, backend: str
) -> str:
    """The path for a backend, from what is known before the first kernel: never from the number of tokens.

    Raises:
        ValueError: if backend is "triton" and Triton cannot run here.
    """
    if backend == "torch" or dtype == torch.float64:
        return "torch"
    on_gpu = device.type == "cuda" and has_triton()
    if backend == "triton":
        if not on_gpu and not (interpreted() and has_triton()):
            raise ValueError(f"backend='triton' needs a GPU and Triton, got tensors on {device}; use backend='auto'")
        return "hopper" if hopper_supports(device, dtype, width, hidden, activation) else "triton"
    if not on_gpu:
        return "torch"
    if hopper_supports(device, dtype, width, hidden, activation):
        return "hopper"
    # grouped_mm: 16-byte strides, fewer than 1024 groups; only for bf16 does it avoid a host synchronisation.
    if dtype == torch.bfloat16 and width % 8 == 0 and hidden % 8 == 0 and num_experts < 1024:
        return "grouped_mm"
    return "torch"


@functools.cache
def gemms(path: str) -> ModuleType:
    """The module with the GEMM launchers of a path; "torch" has them for rows in place only (`RowLayout`).

    Where a launcher takes the result of its module's `expert_rows(source[T, .], routing)`, that may be rows `[P, .]` in
    expert order or, where the GEMM gathers by itself, the source.
    """
    return importlib.import_module(f"lightning_swiftmoe.kernels.expert_mlp.{_GEMMS[path]}")


def tile_rows(device: torch.device) -> int:
    """Rows to which an expert is padded."""
    return 128 if device.type == "cuda" else _INTERPRETER_TILE


def layout_sizes(path: str, num_assignments: int, num_experts: int, device: torch.device) -> tuple[int, int]:
    """Rows of the path's layout and elements of its packed routing."""
    if path == "torch":
        return num_assignments, 2 * num_assignments + num_experts
    from lightning_swiftmoe.kernels.token_permute.padded_routing import packed_size, padded_rows

    tile = tile_rows(device)
    return padded_rows(num_assignments, num_experts, tile), packed_size(num_assignments, num_experts, tile)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous and on a 16-byte boundary, as TMA and wide accesses want it; copies only if need be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
