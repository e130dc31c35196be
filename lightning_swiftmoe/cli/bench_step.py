"""``swiftmoe bench step``: tokens per second, MFU and where the time of a training step goes."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.cli._hydra import run_task
from lightning_swiftmoe.cli.train import build_trainer
from lightning_swiftmoe.models import GPTConfig, count_parameters

# What a kernel's name tells, first match wins.
CATEGORIES = {
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn_generated"),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    # cunn_SoftMax is the loss's: a router's few experts take softmax_warp.
    "embedding and loss": ("embedding", "compute_grad_weight", "sum_and_scatter", "cunn_softmax", "nll_loss"),
    # hidden_grad is ours: it multiplies by the down projection and applies the activation's gradient on the way out.
    "matrix products": (
        *("gemm", "hidden_grad", "cutlass", "nvjet", "grouped", "matmul", "wgrad", "dgrad", "cublas"),
        *("_nt_", "_nn_"),
    ),
}


class StepTimer(pl.Callback):
    """Times ``steps`` training steps after ``warmup``, then profiles ``profiled`` more on the GPU."""

    def __init__(self, warmup: int, steps: int, profiled: int) -> None:
        self.warmup, self.steps, self.profiled = warmup, steps, profiled
        self.seconds: list[float] = []
        self.kernels: dict[str, float] = {}
        self._start = 0.0
        self._profiler: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step."""
        if batch_idx == self.warmup + self.steps and torch.cuda.is_available():
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.warmup <= batch_idx < self.warmup + self.steps:
            self.seconds.append(time.perf_counter() - self._start)
        if self._profiler is not None and batch_idx == self.warmup + self.steps + self.profiled - 1:
            self._profiler.stop()
            for event in self._profiler.key_averages():
                self.kernels[event.key] = event.device_time_total / 1e3 / self.profiled


def main(argv: list[str]) -> int:
    """Overrides as for ``swiftmoe train``."""
    return run_task("train", bench, argv)


def bench(config: DictConfig) -> None:
    """Train a few steps of ``config`` and print the table; results as ``step.json`` in the run folder."""
    timer = StepTimer(warmup=10, steps=20, profiled=5)
    with open_dict(config):
        config.trainer.max_steps = timer.warmup + timer.steps + timer.profiled
        config.callbacks = {"rebalancer": config.callbacks.rebalancer}
        config.logger = {}
        config.trainer.enable_checkpointing = False
        config.trainer.enable_progress_bar = False
    model = GPTConfig(**OmegaConf.to_container(config.model, resolve=True))  # type: ignore[arg-type]
    trainer = build_trainer(config)
    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
    trainer.fit(
        instantiate(config.module, model=model, optimizer=instantiate(config.optimizer)), instantiate(config.data)
    )
    result = summarize(timer, model, config.data.batch_size, config.data.seq_len)
    Path(config.run_dir, "step.json").write_text(json.dumps(result, indent=1))
    Console().print(step_table(result))


def summarize(timer: StepTimer, model: GPTConfig, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Median step, tokens/s, model FLOPs (active parameters, forward and backward) and kernel time by category."""
    seconds, tokens = statistics.median(timer.seconds), batch_size * seq_len
    by_category: dict[str, float] = {}
    for name, ms in timer.kernels.items():
        by_category[category(name)] = by_category.get(category(name), 0.0) + ms
    others = sorted(((ms, n) for n, ms in timer.kernels.items() if category(n) == "other"), reverse=True)
    return {
        "step_ms": seconds * 1e3,
        "tokens_per_s": tokens / seconds,
        "tflops": step_flops(model, tokens, seq_len) / seconds / 1e12,
        "kernel_ms": by_category,
        "largest_others_ms": [(round(ms, 3), name[:90]) for ms, name in others[:15]],
    }


def step_flops(model: GPTConfig, tokens: int, seq_len: int) -> float:
    """Model FLOPs of one step: ``6 * active`` per token without input embeddings, and causal attention.

    The PaLM convention (arXiv 2204.02311, appendix B), halved for the causal mask.
    """
    active = count_parameters(model).active - model.max_seq_len * model.hidden_size * (not model.rotary)
    if not model.tie_embeddings:
        active -= model.vocab_size * model.hidden_size
    return tokens * (6.0 * active + 6.0 * model.num_layers * model.num_heads * model.channels * seq_len)


def category(kernel: str) -> str:
    """Which part of a step a kernel belongs to."""
    low = kernel.lower()
    return next((name for name, words in CATEGORIES.items() if any(word in low for word in words)), "other")


def step_table(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table("one training step", "", box=None)
    table.add_row("median", f"{result['step_ms']:.2f} ms")
    table.add_row("tokens per second", f"{result['tokens_per_s']:,.0f}")
    table.add_row("model TFLOP/s", f"{result['tflops']:.1f}")
    total = sum(result["kernel_ms"].values())
    for name, ms in result["kernel_ms"].items():
        table.add_row(f"  {name}", f"{ms:.2f} ms, {ms / total:.1%} of kernel time")
    for ms, name in result["largest_others_ms"]:
        table.add_row("    other", f"{ms:.2f} ms {name}")
    return table
