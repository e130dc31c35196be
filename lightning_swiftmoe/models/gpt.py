"""A GPT decoder whose feed-forward blocks are Mixture-of-Experts layers.

Shape suffixes: B batch, T tokens of a sequence, D hidden size, H heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_swiftmoe.arguments import check_choice, check_count
from lightning_swiftmoe.functional import activation_names, is_gated
from lightning_swiftmoe.layers import MoE
from lightning_swiftmoe.layers.model_sizes import ModelDescription, ModelSizes
from lightning_swiftmoe.layers.moe import moe_layers


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _gelu_tanh,
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-MoE.

    Args:
        vocab_size: distinct tokens.
        max_seq_len: longest sequence, in tokens.
        num_layers: decoder blocks.
        hidden_size: width of the residual stream.
        num_heads: query heads; must divide ``hidden_size`` unless ``head_size`` is given.
        num_kv_heads: key and value heads (grouped-query attention); None: as many as query heads.
        head_size: channels of a head; None: ``hidden_size / num_heads``.
        ffn_size: hidden units of a dense feed-forward block.
        moe_every: every n-th block is an MoE, counted from the last; 0: none.
        first_dense: this many first blocks are dense whatever ``moe_every`` says.
        num_experts, top_k, expert_ffn_size, capacity_factor, score, aux_loss_coef, z_loss_coef, bias_update_rate,
            shared_ffn_size: as for ``MoE``; ``expert_ffn_size`` None: ``ffn_size``.
        activation: of dense blocks and experts.
        rotary: rotary position embedding instead of a learned one.
        norm: ``"layer"`` or ``"rms"``.
        tie_embeddings: whether input and output embeddings are one tensor.
        checkpoint_activations: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: a size that is none, or sizes that do not fit together.
    """

    vocab_size: int = 256
    max_seq_len: int = 512
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_size: int | None = None
    ffn_size: int = 3072
    moe_every: int = 1
    first_dense: int = 0
    num_experts: int = 16
    top_k: int = 1
    expert_ffn_size: int | None = None
    activation: str = "gelu"
    capacity_factor: float | None = None
    score: str = "softmax"
    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.0
    bias_update_rate: float = 0.0
    shared_ffn_size: int = 0
    rotary: bool = False
    norm: str = "layer"
    tie_embeddings: bool = True
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq_len", "num_layers", "hidden_size", "num_heads", "ffn_size", "num_experts"):
            check_count(name, getattr(self, name))
        for name in ("num_kv_heads", "head_size", "expert_ffn_size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), "None or a positive integer")
        for name in ("moe_every", "first_dense"):
            check_count(name, getattr(self, name), "an integer, zero or more", least=0)
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} must divide hidden_size = {self.hidden_size}, or set head_size"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads = {self.kv_heads} must divide num_heads = {self.num_heads}")
        check_choice("activation", self.activation, activation_names())
        check_choice("norm", self.norm, ("layer", "rms"))
        if self.top_k > self.num_experts or self.top_k < 1:
            raise ValueError(f"top_k must be 1 .. num_experts = {self.num_experts}, got {self.top_k}")
        if self.rotary and self.channels % 2:
            raise ValueError(f"rotary embedding needs an even head size, got {self.channels}")

    def sizes(self) -> ModelSizes:
        """Counts, by a model without memory."""
        count = count_parameters(self)
        return ModelSizes(
            num_layers=self.num_layers,
            num_moe_layers=sum(self.is_moe(index) for index in range(self.num_layers)),
            num_experts=self.num_experts,
            top_k=self.top_k,
            width=self.hidden_size,
            expert_width=self.expert_ffn_size or self.ffn_size,
            gated=is_gated(self.activation),
            vocab_size=self.vocab_size,
            num_params=count.total,
            num_expert_params=count.experts,
            max_seq_len=self.max_seq_len,
            capacity_factor=self.capacity_factor,
            recompute=self.checkpoint_activations,
        )

    def describe(self) -> ModelDescription:
        """Counts; all else is in the configuration."""
        return ModelDescription(
            self.sizes(), "GPT reads windows of text, without labels and positions: choose model=hf"
        )

    @property
    def channels(self) -> int:
        """Channels of one head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_kv_heads or self.num_heads

    def is_moe(self, index: int) -> bool:
        """Whether block ``index`` (from 0) is an MoE."""
        return self.moe_every > 0 and index >= self.first_dense and (index + 1) % self.moe_every == 0


class Attention(nn.Module):
    """Causal self-attention, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width, bias = config.channels, config.norm == "layer"
        self.qkv = nn.Linear(config.hidden_size, (config.num_heads + 2 * config.kv_heads) * width, bias=bias)
        self.out = nn.Linear(config.num_heads * width, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend to earlier tokens and the token itself."""
        config = self.config
        batch, tokens, _ = x_BTD.shape
        sizes = [config.num_heads, config.kv_heads, config.kv_heads]
        heads = self.qkv(x_BTD).view(batch, tokens, sum(sizes), config.channels).transpose(1, 2)
        q, k, v = heads.split(sizes, dim=1)
        if config.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=config.kv_heads != config.num_heads)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


def rotate(x_BHTC: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves paired, angles in fp32."""
    half = x_BHTC.shape[-1] // 2
    device = x_BHTC.device
    frequency = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(x_BHTC.shape[-2], device=device, dtype=torch.float32)[:, None] * frequency
    first, second = x_BHTC.to(torch.promote_types(x_BHTC.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTC.dtype)


class DenseMLP(nn.Module):
    """The feed-forward block where there are no experts."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = is_gated(config.activation)
        self.activate = _ELEMENTWISE[config.activation]
        self.up = nn.Linear(config.hidden_size, config.ffn_size * (1 + self.gated), bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        if not self.gated:
            return self.down(self.activate(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.activate(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
        self.norm_attention = norm(config.hidden_size)
        self.attention = Attention(config)
        self.norm_ffn = norm(config.hidden_size)
        self.ffn: nn.Module = make_moe(config) if config.is_moe(index) else DenseMLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        x_BTD = x_BTD + self.attention(self.norm_attention(x_BTD))
        return x_BTD + self.ffn(self.norm_ffn(x_BTD))


def make_moe(config: GPTConfig) -> MoE:
    """The MoE layer of one block."""
    return MoE(
        config.hidden_size,
        config.expert_ffn_size or config.ffn_size,
        config.num_experts,
        top_k=config.top_k,
        activation=config.activation,
        capacity_factor=config.capacity_factor,
        score=config.score,
        aux_loss_coef=config.aux_loss_coef,
        z_loss_coef=config.z_loss_coef,
        bias_update_rate=config.bias_update_rate,
        shared_ffn_size=config.shared_ffn_size,
    )


class GPT(nn.Module):
    """The decoder: tokens ``[B, T]`` to logits ``[B, T, V]``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = None if config.rotary else nn.Embedding(config.max_seq_len, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, index) for index in range(config.num_layers)])
        self.norm = (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialize_weights()
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Raises:
            ValueError: a sequence longer than ``max_seq_len``.
        """
        if tokens_BT.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens_BT.shape[1]} tokens is longer than max_seq_len = {self.config.max_seq_len}"
            )
        x = self.embed(tokens_BT)
        if self.position is not None:
            x = x + self.position.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting each token of ``[B, T + 1]`` from those before it."""
        logits = self(tokens_BT[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten().long())

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """GPT-2's: normal 0.02, residual projections scaled down by the depth."""
        residual = 0.02 / math.sqrt(2 * self.config.num_layers)
        for moe in moe_layers(self).values():
            # Where they are on the meta device, they are drawn later, one by one.
            moe.experts.initial_std = {moe.experts.up_name: 0.02, "down_proj": residual}
            if moe.router.expert_bias is not None:
                moe.router.expert_bias.zero_()
        for name, param in self.named_parameters():
            if param.ndim >= 2:
                is_residual = name.endswith(("attention.out.weight", "down_proj", "ffn.down.weight"))
                nn.init.normal_(param, std=residual if is_residual else 0.02)
            else:
                nn.init.constant_(param, 0.0 if name.endswith("bias") else 1.0)  # the others are norms


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Args:
        total: all.
        experts: those of routed experts, which the strategy shards.
        active: those a token meets.
    """

    total: int
    experts: int
    active: int


def count_parameters(config: GPTConfig) -> ParameterCount:
    """Parameters of a configuration, counted on a model without memory."""
    with torch.device("meta"):
        model = GPT(config)
    total = sum(param.numel() for param in model.parameters())
    experts = sum(
        p.numel() for block in model.blocks if isinstance(block.ffn, MoE) for p in block.ffn.experts.parameters()
    )
    return ParameterCount(total, experts, total - experts + experts * config.top_k // config.num_experts)
