"""Which part of a training step a GPU kernel belongs to, by its name."""

from __future__ import annotations

# What a kernel's name tells, first match wins.
CATEGORIES = {
    "communication": (
        *("nccl", "symm", "nvshmem"),
        # Ours, through peers' memory.
        *("push_rows", "pull_rows", "pull_scalars", "push_shards", "pull_shards"),
        *("barrier_kernel", "arrive_kernel", "wait_kernel", "exchange_counts"),
    ),
    "plan of tokens": (
        *("count_blocks", "scan_blocks", "address_kernel"),
        *("rank_totals", "scan_ranks", "plan_hosts", "name_rows"),
    ),
    "attention": (
        *("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
        *("cudnn::fusion", "compute_dot_do_o", "convert_dq"),  # cuDNN's helpers around its own
    ),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    # cunn_SoftMax is the loss's: a router's few experts take softmax_warp.
    "embedding and loss": ("embedding", "compute_grad_weight", "sum_and_scatter", "cunn_softmax", "nll_loss"),
    # hidden_grad is ours: it multiplies by the down projection and applies the activation's gradient on the way out.
    "matrix products": (
        *("gemm", "hidden_grad", "cutlass", "nvjet", "grouped", "matmul", "wgrad", "dgrad", "cublas"),
        *("_nt_", "_nn_"),
    ),
}


def category(kernel: str) -> str:
    """Which part of a step a kernel belongs to; ``"other"`` where its name does not tell."""
    low = kernel.lower()
    return next((name for name, words in CATEGORIES.items() if any(word in low for word in words)), "other")
