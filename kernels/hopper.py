"""Launchers of the Hopper GEMMs; `dispatch.hopper_supports` says when they apply.

Shape legend: P padded rows, E experts, K depth, N columns, d model width, h hidden width, H = 2h when gated, else h.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightning_swiftmoe.kernels import gemm_hopper as kernels
from lightning_swiftmoe.kernels.activations import is_gated, kernel_code
from lightning_swiftmoe.kernels.padded_routing import PaddedRouting

BM, BN, BK, HALF = kernels.BLOCK_M, kernels.BLOCK_N, kernels.BLOCK_K, kernels.HALF_N
_LAUNCH = {"BM": BM, "BN": BN, "BK": BK, "STAGES": 3, "WARPS": 8}


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), list(block), _layout(block, tensor.dtype)
    )


def rows_gemm(
    rows: Tensor, weight: Tensor, routing: PaddedRouting, transposed: bool, out: Tensor | None = None, group_m: int = 8
) -> Tensor:
    """`out[p] = rows[p] @ weight[e]` for `weight[E, K, N]`, or with `weight[e].T` for `[E, N, K]` when transposed."""
    depth = rows.shape[1]
    columns = weight.shape[1] if transposed else weight.shape[2]
    if out is None:
        out = rows.new_empty(rows.shape[0], columns)
    flat = weight.view(-1, weight.shape[2])
    out_desc = _descriptor(out, (BM, HALF))
    kernels.rows_gemm_kernel[(_multiprocessors(rows.device.index),)](
        _descriptor(rows, (BM, BK)),
        _descriptor(flat, (BN, BK) if transposed else (BK, BN)),
        out_desc,
        out_desc,
        routing.tile_expert,
        routing.num_rows,
        depth,
        columns,
        0,
        weight.shape[1],
        NT=transposed,
        GATED=False,
        ACT=-1,
        GROUP_M=group_m,
        num_warps=8,
        **_LAUNCH,
    )
    return out


def up_gemm(
    rows: Tensor, up_proj: Tensor, routing: PaddedRouting, activation: str, group_m: int = 8
) -> tuple[Tensor, Tensor]:
    """`pre[P, H] = rows @ up_proj[e].T` and `hidden[P, h] = act(pre)`, the activation taken from the accumulators."""
    gated = is_gated(activation)
    pre = rows.new_empty(rows.shape[0], up_proj.shape[1])
    hidden_width = up_proj.shape[1] // (2 if gated else 1)
    hidden = rows.new_empty(rows.shape[0], hidden_width)
    kernels.rows_gemm_kernel[(_multiprocessors(rows.device.index),)](
        _descriptor(rows, (BM, BK)),
        _descriptor(up_proj.view(-1, up_proj.shape[2]), (HALF if gated else BN, BK)),
        _descriptor(pre, (BM, HALF)),
        _descriptor(hidden, (BM, HALF)),
        routing.tile_expert,
        routing.num_rows,
        rows.shape[1],
        hidden_width,
        hidden_width,
        up_proj.shape[1],
        NT=True,
        GATED=gated,
        ACT=kernel_code(activation, rows.dtype),
        GROUP_M=group_m,
        num_warps=8,
        **_LAUNCH,
    )
    return pre, hidden


def hidden_grad_gemm(
    grad_rows: Tensor,
    down_proj: Tensor,
    pre: Tensor,
    row_scale: Tensor,
    routing: PaddedRouting,
    activation: str,
    group_m: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_rows @ down_proj[e]` and the activation backward taken from its accumulators.

    Returns:
        `grad_pre[P, H]`, `scaled_hidden[P, h]` and `partials[n, P]`, whose sum over n is each row's router gradient.
    """
    hidden_width = down_proj.shape[2]
    columns = BN // 4
    grad_pre = torch.empty_like(pre)
    scaled_hidden = pre.new_empty(pre.shape[0], hidden_width)
    partials = torch.empty(-(-hidden_width // BN), pre.shape[0], dtype=torch.float32, device=pre.device)
    kernels.hidden_grad_kernel[(_multiprocessors(grad_rows.device.index),)](
        _descriptor(grad_rows, (BM, BK)),
        _descriptor(down_proj.view(-1, hidden_width), (BK, BN)),
        _descriptor(pre, (BM, columns)),
        _descriptor(grad_pre, (BM, columns)),
        _descriptor(scaled_hidden, (BM, columns)),
        row_scale,
        partials,
        routing.tile_expert,
        routing.num_rows,
        grad_rows.shape[1],
        hidden_width,
        hidden_width,
        down_proj.shape[1],
        pre.shape[0],
        GATED=is_gated(activation),
        ACT=kernel_code(activation, pre.dtype),
        GROUP_M=group_m,
        num_warps=8,
        **_LAUNCH,
    )
    return grad_pre, scaled_hidden, partials


def weight_gemm(left: Tensor, right: Tensor, routing: PaddedRouting, group_m: int = 8) -> Tensor:
    """`out[e] = left[rows of e].T @ right[rows of e]` as `[E, M, N]`; zeros for an expert without rows.

    A tile of 128 rows of the result must not reach into the next expert's: other M go to torch.
    """
    if left.shape[1] % BM:
        return F.grouped_mm(left.mT, right, offs=routing.padded_ends)
    num_experts = routing.ends.shape[0]
    out = left.new_empty(num_experts, left.shape[1], right.shape[1])
    kernels.weight_gemm_kernel[(_multiprocessors(left.device.index),)](
        _descriptor(left, (BK, BM)),
        _descriptor(right, (BK, BN)),
        _descriptor(out.view(-1, right.shape[1]), (BM, HALF)),
        routing.starts,
        routing.ends,
        num_experts,
        left.shape[1],
        right.shape[1],
        GROUP_M=group_m,
        num_warps=8,
        **_LAUNCH,
    )
    return out
