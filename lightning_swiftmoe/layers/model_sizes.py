"""How large a language model with experts is, whoever built it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class ModelSizes:
    """Counts of a causal language model.

    Args:
        num_layers: blocks.
        num_moe_layers: those with experts.
        num_experts: of one of them.
        top_k: experts of a token.
        width: of the residual stream.
        expert_width: hidden width of an expert.
        gated: experts have a third matrix.
        vocab_size: tokens of the vocabulary.
        num_params: all of them.
        num_expert_params: of all experts of all layers.
        max_seq_len: tokens of the longest sequence; None: the model does not say.
        capacity_factor: of its layers; None: they drop no tokens.
        recompute: activations are computed again in the backward.
        block_bytes: that a block keeps outside of its experts for a token, by unit of ``width``, in mixed precision;
            measured: docs/results/olmoe.md.
    """

    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    width: int
    expert_width: int
    gated: bool
    vocab_size: int
    num_params: int
    num_expert_params: int
    max_seq_len: int | None = None
    capacity_factor: float | None = None
    recompute: bool = False
    block_bytes: int = 32

    @property
    def num_dense_params(self) -> int:
        """All but experts."""
        return self.num_params - self.num_expert_params

    @property
    def num_active_params(self) -> int:
        """Those that a token meets."""
        return self.num_dense_params + self.num_expert_params * self.top_k // self.num_experts

    @property
    def num_params_of_expert(self) -> int:
        """Of one expert of one layer; 0 without experts."""
        return self.num_expert_params // max(1, self.num_moe_layers * self.num_experts)


@dataclass(frozen=True)
class ModelDescription:
    """What there is to know of a model before it trains.

    Args:
        sizes: of it.
        why_no_packing: why several conversations cannot share a sequence; None: they can.
        remarks: what a user should know, by a name of a few words.
    """

    sizes: ModelSizes
    why_no_packing: str | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)


class DescribedModel(Protocol):
    """Configuration of a model, whoever builds it."""

    def describe(self) -> ModelDescription:
        """Of what will be built; no weight is made or read.

        Raises:
            ValueError: it cannot be built.
        """
        ...
