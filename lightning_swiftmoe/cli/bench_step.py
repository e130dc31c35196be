"""``swiftmoe bench step``: tokens per second, MFU and where the time of a training step goes."""

from __future__ import annotations

import copy
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table

from lightning_swiftmoe.cli import _deepspeed_peer
from lightning_swiftmoe.cli._hydra import run_benchmark
from lightning_swiftmoe.cli._kernel_kinds import category
from lightning_swiftmoe.cli._measured import Measured, of_all_ranks, received_payload, talks_through_tcp
from lightning_swiftmoe.cli._models import gpt_of
from lightning_swiftmoe.cli._peers.command import side_by_side
from lightning_swiftmoe.cli._peers.options import OPTION_NAMES, Options
from lightning_swiftmoe.cli.train import build_trainer, check_fit, forget_ranks, name_this_job_to_children
from lightning_swiftmoe.models import GPTConfig, count_parameters

PROFILED = 5  # steps under the profiler, after the timed ones
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StepTimer(pl.Callback):
    """Times ``steps`` training steps after ``warmup``, then profiles ``profiled`` more on the GPU.

    Rank 0 may be another process than the one that asks for its results: it writes them to ``output``.
    """

    def __init__(self, warmup: int, steps: int, profiled: int, output: Path) -> None:
        self.warmup, self.steps, self.profiled, self.output = warmup, steps, profiled, output
        self.measured = Measured()
        self._start = 0.0
        self._received = 0
        self._profiler: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step."""
        if batch_idx == self.warmup and talks_through_tcp():
            self._received = received_payload()
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
            self.measured.seconds.append(time.perf_counter() - self._start)
            metrics = trainer.callback_metrics
            self.measured.losses.append(float(metrics["train/loss"]))
            if "moe/token_survival" in metrics:
                self.measured.survival.append(float(metrics["moe/token_survival"]))
        if batch_idx == self.warmup + self.steps - 1 and talks_through_tcp():
            self._received = received_payload() - self._received
        if self._profiler is not None and batch_idx == self.warmup + self.steps + self.profiled - 1:
            self._profiler.stop()
            for event in self._profiler.key_averages():
                self.measured.kernels[event.key] = event.device_time_total / 1e3 / self.profiled

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rank 0 writes; all take part, for the bytes of each."""
        if talks_through_tcp():
            self.measured.received_bytes = of_all_ranks(self._received / self.steps)
        if trainer.is_global_zero:
            self.measured.write(self.output)


def main(argv: list[str]) -> int:
    """Overrides as for ``swiftmoe train``, and those of ``conf/bench/step.yaml``."""
    argv = ["profile=true" if word == "--profile" else word for word in argv]
    return run_benchmark("step", bench, argv, OPTION_NAMES)


def bench(config: DictConfig, own: list[str]) -> None:
    """Train a few steps of ``config`` and print the table; results as ``step.json`` in the run folder, or ``output``.

    Args:
        config: of ``swiftmoe train``.
        own: overrides of ``conf/bench/step.yaml``.
    """
    options = Options.of(config, own)
    if options.in_processes_of_their_own(config):
        side_by_side(config, options)
        return
    model = gpt_of(config)
    train_and_nothing_else(config, options.warmup + options.steps + PROFILED)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # hardware lists, tips
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    name_this_job_to_children()
    sys.argv[1:1] = ["bench", "step", *own]
    if config.cluster.start_method == "fork":
        torch.set_num_threads(1)  # a forked pool of threads hangs
    if options.peers:
        result = compare(config, model, options)
        table = peers_table(result)
    else:
        measured = train_steps(config, model, options)
        if measured is None:
            return  # a rank that Lightning started: rank 0 reports
        result = summarize(measured, model, config.data.batch_size, config.data.seq_len)
        table = step_table(result)
    Path(options.output or Path(config.run_dir, "step.json")).write_text(json.dumps(result, indent=1))
    Console().print(table)


def train_and_nothing_else(config: DictConfig, max_steps: int) -> None:
    """Change ``config``: so many steps, without loggers, checkpoints and a progress bar."""
    with open_dict(config):
        config.trainer.max_steps = max_steps
        config.callbacks = {"rebalancer": config.callbacks.rebalancer}
        config.logger = {}
        config.trainer.enable_checkpointing = False
        config.trainer.enable_progress_bar = False


def compare(config: DictConfig, model: GPTConfig, options: Options) -> dict[str, Any]:
    """The summary of each system by name, first the peers; they take turns.

    ``static`` is our strategy with DeepSpeed's rules, as ``strategy=static``: uniform replicas, optimizer state on the
    hosts, every rank drops on its own. ``swiftmoe`` is SwiftMoE as published, with the policy of ``config``.

    Raises:
        ImportError: a peer's package is not installed.
        ValueError: something a peer cannot do.
    """
    _deepspeed_peer.check(config, model)
    check_fit(config, model.describe(), instantiate(config.data), instantiate(config.optimizer), build_trainer(config))
    config.callbacks.rebalancer.trace = None
    swiftmoe, static = copy.deepcopy(config), copy.deepcopy(config)
    swiftmoe.strategy.update({"capacity_scope": "cluster", "split": "even", "optimizer_state": "decoupled"})
    static.strategy.update({"capacity_scope": "rank", "split": "even", "optimizer_state": "bound"})
    static.policy.name, static.policy.every_n_steps = "static", 1
    deepspeed = partial(_deepspeed_peer.train_steps, config, model, options.warmup, options.steps, PROFILED)
    systems: dict[str, Callable[[], Measured | None]] = {
        "deepspeed": deepspeed,
        "static": partial(train_steps, static, model, options),
        "swiftmoe": partial(train_steps, swiftmoe, model, options),
    }
    results: dict[str, Measured] = {}
    for _ in range(options.rounds):
        for name, run in systems.items():
            measured = run()
            assert measured is not None, "forked ranks return to this process alone"
            results[name] = results[name] + measured if name in results else measured
    return {n: summarize(m, model, config.data.batch_size, config.data.seq_len) for n, m in results.items()}


def train_steps(config: DictConfig, model: GPTConfig, options: Options) -> Measured | None:
    """Train with Lightning and our strategy; what rank 0 measured, and None in the other ranks' processes."""
    environment = {key: os.environ.get(key) for key in RANK_VARIABLES}
    try:
        with tempfile.TemporaryDirectory() as folder:
            timer = StepTimer(options.warmup, options.steps, PROFILED, Path(folder, "measured.json"))
            trainer = build_trainer(config)
            trainer.callbacks.append(timer)  # type: ignore[attr-defined]
            module = instantiate(config.module, model=model, optimizer=instantiate(config.optimizer))
            trainer.fit(module, instantiate(config.data))
            return Measured.read(timer.output) if trainer.is_global_zero else None
    finally:
        forget_ranks(environment)


def summarize(measured: Measured, model: GPTConfig, batch_size: int, seq_len: int) -> dict[str, Any]:
    """Medians and means of the measured steps, and kernel time by category.

    Model FLOPs are those of active parameters, forward and backward; ``received_bytes`` are of one step and rank.
    """
    seconds, tokens = statistics.median(measured.seconds), batch_size * seq_len
    by_category: dict[str, float] = {}
    for name, ms in measured.kernels.items():
        by_category[category(name)] = by_category.get(category(name), 0.0) + ms
    others = sorted(((ms, n) for n, ms in measured.kernels.items() if category(n) == "other"), reverse=True)
    return {
        "step_ms": seconds * 1e3,
        "steps_ms": [round(value * 1e3, 3) for value in measured.seconds],
        "tokens_per_s": tokens / seconds,
        "tflops": step_flops(model, tokens, seq_len) / seconds / 1e12,
        "losses": measured.losses,
        "survival": mean(measured.survival),
        "received_bytes": mean(measured.received_bytes),
        "kernel_ms": by_category,
        "largest_others_ms": [(round(ms, 3), name[:90]) for ms, name in others[:15]],
    }


def mean(values: list[float]) -> float | None:
    """None where nothing was measured."""
    return statistics.fmean(values) if values else None


def step_flops(model: GPTConfig, tokens: int, seq_len: int) -> float:
    """Model FLOPs of one step: ``6 * active`` per token without input embeddings, and causal attention.

    The PaLM convention (arXiv 2204.02311, appendix B), halved for the causal mask.
    """
    active = count_parameters(model).active - model.max_seq_len * model.hidden_size * (not model.rotary)
    if not model.tie_embeddings:
        active -= model.vocab_size * model.hidden_size
    return tokens * (6.0 * active + 6.0 * model.num_layers * model.num_heads * model.channels * seq_len)


def step_table(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table("one training step", "", box=None)
    table.add_row("median", f"{result['step_ms']:.2f} ms")
    table.add_row("tokens per second", f"{result['tokens_per_s']:,.0f}")
    table.add_row("model TFLOP/s", f"{result['tflops']:.1f}")
    if result["survival"] is not None:
        table.add_row("token survival", f"{result['survival']:.1%}")
    if result["received_bytes"] is not None:
        table.add_row("received through TCP", f"{result['received_bytes'] / 1e6:.2f} MB a rank")
    total = sum(result["kernel_ms"].values())
    for name, ms in result["kernel_ms"].items():
        table.add_row(f"  {name}", f"{ms:.2f} ms, {ms / total:.1%} of kernel time")
    for ms, name in result["largest_others_ms"]:
        table.add_row("    other", f"{ms:.2f} ms {name}")
    return table


def peers_table(results: dict[str, dict[str, Any]]) -> Table:
    """For people: systems side by side, times beside the first's."""
    table = Table("system", box=None)
    for heading in ("step", "quartiles", "of first", "tokens/s", "survival", "received/rank", "last loss"):
        table.add_column(heading, justify="right")
    first = next(iter(results.values()))["step_ms"]
    for name, result in results.items():
        times = result["steps_ms"]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        table.add_row(
            name,
            f"{result['step_ms']:.1f} ms",
            f"{low:.1f} .. {high:.1f}",
            f"{result['step_ms'] / first:.2f}",
            f"{result['tokens_per_s']:,.0f}",
            "" if result["survival"] is None else f"{result['survival']:.1%}",
            "" if result["received_bytes"] is None else f"{result['received_bytes'] / 1e6:.2f} MB",
            f"{result['losses'][-1]:.3f}",
        )
    return table
