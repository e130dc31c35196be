"""Synthetic loads: the shapes that routing takes, from even to pathological. Seeded, so the same twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.arguments import check_count, check_not_negative
from lightning_swiftmoe.simulate.load_trace import LoadTrace

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Workload:
    """How much is routed.

    Args:
        num_steps: consecutive steps.
        num_layers: MoE layers; each has its own hot experts.
        num_experts: experts of a layer.
        tokens: tokens of the global batch.
        top_k: assignments per token; no expert gets more than one of them.
        num_ranks: sources; 1 leaves them open.
        seed: an integer, zero or more.
        skew: exponent of the Zipf-like generators; 0 is even.
        pace: how fast loads move, in the unit of each generator (its docstring says).
    """

    num_steps: int = 100
    num_layers: int = 2
    num_experts: int = 16
    tokens: int = 32768
    top_k: int = 1
    num_ranks: int = 1
    seed: int = 0
    skew: float = 1.0
    pace: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_layers", "num_experts", "tokens", "top_k", "num_ranks"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, "an integer, zero or more", least=0)
        for name in ("skew", "pace"):
            check_not_negative(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} needs at least as many experts, got num_experts={self.num_experts}")
        if self.tokens % self.num_ranks:
            raise ValueError(f"tokens={self.tokens} do not divide evenly over num_ranks={self.num_ranks}")


def balanced(work: Workload, rng: np.random.Generator) -> FloatArray:
    """Every expert the same."""
    return np.full((work.num_steps, work.num_experts), 1.0)


def zipf(work: Workload, rng: np.random.Generator) -> FloatArray:
    """Popularity ``1 / rank**skew``, constant over time."""
    return np.tile(rng.permutation(_zipf(work)), (work.num_steps, 1))


def one_hot(work: Workload, rng: np.random.Generator) -> FloatArray:
    """One expert draws everything it can."""
    return np.tile(np.eye(work.num_experts)[rng.integers(work.num_experts)], (work.num_steps, 1))


def drift(work: Workload, rng: np.random.Generator) -> FloatArray:
    """Zipf whose logarithm does a random walk around even loads: ``0.1 * pace`` a step, of spread ``skew``."""
    rate = min(0.1 * work.pace, 1.0)
    log_load = rng.normal(0, work.skew, work.num_experts)
    rows = []
    for _ in range(work.num_steps):
        rows.append(log_load)
        log_load = log_load * np.sqrt(1 - rate**2) + rng.normal(0, work.skew * rate, work.num_experts)
    return np.exp(np.stack(rows))


def switch(work: Workload, rng: np.random.Generator) -> FloatArray:
    """Zipf that is shuffled ``pace`` times, abruptly, at equal distances."""
    num_changes = max(int(work.pace), 1)
    rows = [rng.permutation(_zipf(work)) for _ in range(num_changes + 1)]
    at = np.arange(work.num_steps) * (num_changes + 1) // work.num_steps
    return np.stack(rows)[at]


def hotspot(work: Workload, rng: np.random.Generator) -> FloatArray:
    """One expert is ``1 + 4 * skew`` times as hot as the others; the next one takes over every ``10 / pace`` steps."""
    hot = (np.arange(work.num_steps) * work.pace / 10).astype(int) + rng.integers(work.num_experts)
    return 1 + 4 * work.skew * np.eye(work.num_experts)[hot % work.num_experts]


def bursts(work: Workload, rng: np.random.Generator) -> FloatArray:
    """Even, but every expert has a chance of ``pace`` percent a step to be 16 times as hot for three steps.

    The paper saw loads move by up to 16x within three steps (SwiftMoE, section 2).
    """
    starts = rng.random((work.num_steps + 2, work.num_experts)) < 0.01 * work.pace
    active = starts[2:] | starts[1:-1] | starts[:-2]
    return 1 + 15.0 * active


GENERATORS: dict[str, Callable[[Workload, np.random.Generator], FloatArray]] = {
    "balanced": balanced,
    "zipf": zipf,
    "one_hot": one_hot,
    "drift": drift,
    "switch": switch,
    "hotspot": hotspot,
    "bursts": bursts,
}


def generate(name: str, work: Workload) -> LoadTrace:
    """A trace of that shape: ``[steps, layers, ranks, experts]`` counts that add up to ``tokens * top_k`` every time.

    Args:
        name: one of ``GENERATORS``.
        work: sizes, seed and parameters.

    Raises:
        ValueError: no generator of that name.
    """
    if name not in GENERATORS:
        raise ValueError(f"unknown generator {name!r}; there are {', '.join(sorted(GENERATORS))}")
    layers = []
    for layer in range(work.num_layers):
        rng = np.random.default_rng([work.seed, layer])
        shares = [feasible(row, work.top_k) for row in GENERATORS[name](work, rng)]
        layers.append(np.stack([_draw(share, work, rng) for share in shares]))
    counts = np.stack(layers, axis=1)
    return LoadTrace(counts, np.arange(work.num_steps), work.top_k, f"{name} (synthetic, seed {work.seed})")


def _zipf(work: Workload) -> FloatArray:
    return 1.0 / np.arange(1, work.num_experts + 1) ** work.skew


def feasible(popularity: FloatArray, top_k: int) -> FloatArray:
    """Shares of assignments, none above ``1 / top_k``: a token goes to ``top_k`` different experts."""
    share = popularity / popularity.sum()
    full = np.zeros(share.size, dtype=bool)
    while (share > 1 / top_k * (1 + 1e-12)).any():
        full |= share > 1 / top_k
        rest = np.where(full, 0, popularity)
        # With no popularity left among the others they share alike.
        rest = rest if rest.sum() > 0 else (~full).astype(float)
        share = np.where(full, 1 / top_k, rest / rest.sum() * (1 - full.sum() / top_k))
    return share


def _draw(share: FloatArray, work: Workload, rng: np.random.Generator) -> NDArray[np.int64]:
    """``[ranks, experts]``: a multinomial draw for each rank; with open sources the rounded expectation of the sum."""
    if work.num_ranks > 1:
        per_rank = work.tokens // work.num_ranks * work.top_k
        return rng.multinomial(per_rank, share / share.sum(), size=work.num_ranks).astype(np.int64)
    upper = np.rint(np.cumsum(share) / share.sum() * work.tokens * work.top_k).astype(np.int64)
    return np.diff(upper, prepend=0)[None]
