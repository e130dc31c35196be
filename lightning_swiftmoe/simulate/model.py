"""The shape of a GPT-MoE: parameters, FLOPs and bytes, nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lightning_swiftmoe.placement.capacity import USUAL_LOAD


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer whose MLPs are (partly) experts. All fields are counts.

    Args:
        dim: width of the residual stream.
        ffn_dim: hidden width of one expert.
        num_layers: transformer blocks.
        num_moe_layers: blocks whose MLP is an MoE layer.
        num_experts: experts of one MoE layer.
        top_k: experts per token.
        vocab_size: tokens of the vocabulary; input and output embeddings are tied.
        seq_len: tokens of a sequence.
        gated: experts have a third matrix (SwiGLU).
        recompute: blocks keep their input only and run again in backward.
        weight_bytes: bytes of one parameter in a slot, and of one activation.
        grad_bytes: bytes of one gradient element on the wire.
        state_bytes: optimizer state of one parameter: fp32 master copy, two moments, fp32 gradient
            (16 B with Adam: SwiftMoE, section 2; ZeRO, arXiv 1910.02054, section 3.1, counts the same four).
        num_other_params: parameters outside the experts when they are known; 0 estimates them from the sizes above.
        block_bytes: that a block keeps outside of its experts for a token, by unit of ``dim``, in mixed precision with
            an fp32 residual stream: measured, 32 of our GPT, 49 of OLMoE in transformers, whose norms keep fp32 copies
            (docs/results/olmoe.md).

    Raises:
        ValueError: a size below one, more MoE layers than layers, or ``top_k`` above the number of experts.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int = 1
    vocab_size: int = 50257
    seq_len: int = 512
    gated: bool = False
    recompute: bool = False
    weight_bytes: int = 2
    grad_bytes: int = 2
    state_bytes: int = 16
    num_other_params: int = 0
    block_bytes: int = 32

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            least = 0 if spec.name == "num_other_params" else 1
            if not isinstance(value, bool) and (not isinstance(value, int) or value < least):
                raise ValueError(f"model {spec.name} must be a positive integer, got {value!r}")
        if self.num_moe_layers > self.num_layers:
            raise ValueError(f"{self.num_moe_layers} MoE layers do not fit into {self.num_layers} layers")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} needs at least as many experts, got {self.num_experts}")

    @property
    def expert_params(self) -> int:
        """Parameters ``P`` of one expert of one layer: two matrices, three when gated; biases left out."""
        return (3 if self.gated else 2) * self.dim * self.ffn_dim

    @property
    def grad_expert_bytes(self) -> int:
        """``G``: gradient of one expert."""
        return self.expert_params * self.grad_bytes

    @property
    def weight_expert_bytes(self) -> int:
        """``W``: weights of one expert."""
        return self.expert_params * self.weight_bytes

    @property
    def token_bytes(self) -> int:
        """One token's activations on the wire."""
        return self.dim * self.weight_bytes

    @property
    def dense_params(self) -> int:
        """Parameters outside the experts: attention (4 d^2), dense MLPs, routers, embeddings."""
        if self.num_other_params:
            return self.num_other_params
        attention = 4 * self.dim**2 * self.num_layers
        dense_mlp = 2 * self.dim * 4 * self.dim * (self.num_layers - self.num_moe_layers)
        router = self.dim * self.num_experts * self.num_moe_layers
        return attention + dense_mlp + router + (self.vocab_size + self.seq_len) * self.dim

    @property
    def total_params(self) -> int:
        """All parameters, each expert counted once."""
        return self.dense_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def dense_flops_per_token(self) -> float:
        """Forward FLOPs outside the experts: 2 per parameter (the output embedding included) and attention scores."""
        scores = 4 * self.seq_len * self.dim * self.num_layers
        return 2.0 * (self.dense_params - self.seq_len * self.dim) + scores

    @property
    def expert_flops_per_token(self) -> float:
        """Forward FLOPs of one assignment in one layer: 2 per parameter."""
        return 2.0 * self.expert_params

    def activation_bytes(self, tokens_per_rank: float) -> int:
        """Activations of one rank at their peak, when the loss is computed.

        A block keeps ``block_bytes * dim`` for a token, and a dense MLP 19 of 34 parts on top of the other 15
        (Korthikanti et al., arXiv 2205.05198, equation 2). Experts keep pre-activations of ``USUAL_LOAD`` times a
        rank's share. Logits are there in bf16, in fp32, and as fp32 log-probabilities: 10 bytes. With recomputation
        each block keeps its fp32 input, 4 bytes, and one at a time the rest; pre-activations stay in the memory of
        recorded graphs.
        """
        experts = USUAL_LOAD * self.top_k * self.hidden_rows * self.weight_bytes
        outside = self.block_bytes * self.dim * self.num_layers
        if self.recompute:
            outside = (4 * self.num_layers + self.block_bytes) * self.dim
        mlps = 19 * self.dim * (1 if self.recompute else self.num_layers - self.num_moe_layers)
        mlps *= self.num_layers > self.num_moe_layers
        return math.ceil(tokens_per_rank * (outside + mlps + experts * self.num_moe_layers + 10 * self.vocab_size))

    @property
    def hidden_rows(self) -> int:
        """Rows of an expert's up projection, gate included."""
        return (2 if self.gated else 1) * self.ffn_dim


def _paper(dim: int, num_layers: int) -> ModelShape:
    return ModelShape(
        dim=dim, ffn_dim=4 * dim, num_layers=num_layers, num_moe_layers=num_layers, num_experts=16, top_k=1
    )


# GPT sizes of SwiftMoE, section 5 (125M, 350M, 760M dense parameters); every MLP an MoE layer of 16 experts.
PAPER_MODELS = {"gpt-small": _paper(768, 12), "gpt-medium": _paper(1024, 24), "gpt-large": _paper(1536, 24)}
