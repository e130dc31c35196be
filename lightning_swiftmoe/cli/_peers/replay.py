"""Routing that a load trace dictates: every system sends the same tokens to the same experts, step by step.

A router computes its logits as ever; those of the experts that a token must go to are then raised far above the others.
So gates, their gradients and everything behind the router run as in training, under loads that are given.

Shape legend: S steps, L MoE layers, N ranks, E experts, T tokens of a rank, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_swiftmoe.layers.router import Router
from lightning_swiftmoe.simulate import LoadTrace
from lightning_swiftmoe.simulate.generators import feasible

# Far above any logit, and still exact to an eighth in bf16, in which some routers multiply.
PREFERENCE = 30.0


def loads_of_ranks(trace: LoadTrace, num_steps: int, num_layers: int, num_ranks: int, tokens: int) -> NDArray[np.int64]:
    """``[S, L, N, E]`` assignments with the trace's shares.

    Every rank has ``tokens * top_k`` of them, and at most ``tokens`` for one expert. Steps and layers begin anew where
    the trace has fewer. Ranks of a trace with as many have their own shares, else all have those of the sum.

    Args:
        trace: the shares.
        num_steps, num_layers, num_ranks: what is asked for.
        tokens: T.
    """
    steps = np.arange(num_steps) % trace.num_steps
    layers = np.arange(num_layers) % trace.num_layers
    counts = trace.counts[np.ix_(steps, layers)].astype(np.int64)
    if trace.num_ranks != num_ranks:
        counts = np.repeat(counts.sum(axis=2, keepdims=True), num_ranks, axis=2)
    flat = counts.reshape(-1, trace.num_experts)
    shares = np.stack([feasible(row.astype(np.float64), trace.top_k) for row in flat])
    upper = np.rint(np.cumsum(shares, axis=1) * tokens * trace.top_k).astype(np.int64)
    return np.diff(upper, axis=1, prepend=0).reshape(counts.shape)


def experts_of_tokens(load: NDArray[np.integer], top_k: int, order: NDArray[np.integer]) -> NDArray[np.uint8]:
    """``[T, K]`` different experts of each token, so that expert ``e`` has ``load[e]`` of them.

    Assignments lie in a row, expert by expert, and are dealt out to the tokens in turns. No expert has more than T, so
    none comes to a token twice.

    Args:
        load: ``[E]``, adds up to ``T * K``.
        top_k: K.
        order: ``[T]`` a permutation: which token has which turn.
    """
    row = np.repeat(np.arange(load.size, dtype=np.uint8), load)
    return np.ascontiguousarray(row.reshape(top_k, -1).T[order])


class Replay:
    """What the layers of one rank are told.

    Args:
        loads: ``[S, L, E]`` of this rank.
        top_k: K.
        device: of the routers.
    """

    def __init__(self, loads: NDArray[np.integer], top_k: int, device: torch.device) -> None:
        num_tokens = int(loads[0, 0].sum()) // top_k
        order = np.random.default_rng(0).permutation(num_tokens)
        by_layer = [
            np.stack([experts_of_tokens(load, top_k, order) for load in loads[:, layer]])
            for layer in range(loads.shape[1])
        ]
        self._layers = [LayerReplay(torch.from_numpy(experts).to(device)) for experts in by_layer]

    @classmethod
    def read(cls, path: str | Path, rank: int, device: torch.device) -> Replay:
        """Of one rank, from a file of ``write_replay``."""
        with np.load(path) as arrays:
            return cls(arrays["loads"][:, :, rank], int(arrays["top_k"]), device)

    def layer(self, number: int) -> LayerReplay:
        """What the MoE layer of that number is told."""
        return self._layers[number]


class LayerReplay:
    """What one layer is told, a step after the other.

    Args:
        experts: ``[S, T, K]`` uint8.
    """

    def __init__(self, experts: Tensor) -> None:
        self.experts = experts
        self._step = 0

    def prefer(self, logits: Tensor) -> Tensor:
        """``[T, E]`` with this step's experts far above the others; the next call is the next step's.

        Raises:
            ValueError: another number of tokens than was planned for, or more steps.
        """
        if self._step == self.experts.shape[0]:
            raise ValueError(f"routing was planned for {self._step} steps, one forward in each, and there is one more")
        chosen = self.experts[self._step].long()
        if logits.shape[0] != chosen.shape[0]:
            raise ValueError(f"routing was planned for {chosen.shape[0]} tokens a rank, got {logits.shape[0]}")
        self._step += 1
        return logits.scatter_add(1, chosen, logits.new_full((1, 1), PREFERENCE).expand_as(chosen))


class ReplayedRouter(Router):
    """Ours.

    Args:
        router: whose weight and settings it takes.
        replay: of its layer.
    """

    def __init__(self, router: Router, replay: LayerReplay) -> None:
        num_experts, hidden_size = router.weight.shape
        super().__init__(
            hidden_size,
            num_experts,
            top_k=router.top_k,
            score=router.score,
            normalize_topk=router.normalize_topk,
            bias_update_rate=router.bias_update_rate,
        )
        self.weight = router.weight
        self.replay = replay

    def logits(self, x_TD: Tensor) -> Tensor:
        """Those of the trace highest."""
        return self.replay.prefer(super().logits(x_TD))


class ReplayedLinear(nn.Module):
    """A gate that is a matrix product.

    Args:
        linear: the product.
        replay: of its layer.
    """

    def __init__(self, linear: nn.Linear, replay: LayerReplay) -> None:
        super().__init__()
        self.weight = linear.weight
        self.replay = replay

    def forward(self, x: Tensor) -> Tensor:
        """Logits, those of the trace highest."""
        return self.replay.prefer(nn.functional.linear(x, self.weight))


def write_replay(path: Path, loads: Sequence[NDArray[np.integer]], top_k: int) -> None:
    """One after the other, each ``[S, L, N, E]``."""
    arrays: dict[str, Any] = {"loads": np.concatenate(list(loads)), "top_k": top_k}
    np.savez_compressed(path, **arrays)
