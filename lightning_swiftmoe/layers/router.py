"""The router: scores every token against every expert and picks the top-k.

Shape suffixes: T tokens, D hidden size, E experts, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_swiftmoe.functional import SCORES, route_tokens

__all__ = ["SCORES", "Router", "Routing", "no_tokens"]


@dataclass(frozen=True)
class Routing:
    """Where the local tokens want to go.

    Args:
        topk_idx: ``[T, K]`` int64 experts of each token; -1 for none, which ``Router`` never says.
        topk_weights: ``[T, K]`` gate weights, fp32 (fp64 for fp64 inputs), differentiable.
        prob_sum: ``[E]`` routing probabilities summed over the local tokens, differentiable.
        z_sum: scalar, squared log-sum-exp of the logits summed over the local tokens, differentiable.
        counts: ``[E]`` int64, how many of ``topk_idx`` name each expert.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    prob_sum: Tensor
    z_sum: Tensor
    counts: Tensor


def no_tokens(num_experts: int, top_k: int, like: Tensor) -> Routing:
    """The routing of no tokens at all, on the device of ``like``; gate weights have the dtype that its tokens' have."""
    weights = like.new_zeros(0, top_k, dtype=torch.promote_types(like.dtype, torch.float32))
    idx = like.new_zeros(0, top_k, dtype=torch.int64)
    sums = weights.new_zeros(num_experts)
    return Routing(idx, weights, sums, weights.new_zeros(()), sums.to(torch.int64))


class Router(nn.Module):
    """Linear scores in at least fp32, then top-k.

    With ``bias_update_rate > 0`` experts are chosen by ``score + expert_bias`` and weighted by ``score`` alone
    (loss-free balancing, arXiv 2408.15664).
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        score: str,
        normalize_topk: bool,
        bias_update_rate: float,
    ) -> None:
        super().__init__()
        self.top_k, self.score = top_k, score
        self.normalize_topk, self.bias_update_rate = normalize_topk, bias_update_rate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("expert_bias", torch.zeros(num_experts) if bias_update_rate > 0 else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as ``nn.Linear`` does; zero the bias."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, x_TD: Tensor) -> Routing:
        """Route ``x_TD``; see ``Routing``."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            return Routing(*route_tokens(logits_TE, self.top_k, self.score, self.normalize_topk, self.expert_bias))

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` what scores are made of, in at least fp32."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    @torch.no_grad()
    def update_bias(self, loads: Tensor) -> None:
        """Move each expert's bias one step towards balance: ``b += rate * sign(mean(loads) - loads)``.

        Args:
            loads: ``[E]`` assignments of the last step over all ranks.
        """
        if self.expert_bias is None:
            return
        loads = loads.to(self.expert_bias)
        self.expert_bias += self.bias_update_rate * torch.sign(loads.mean() - loads)
