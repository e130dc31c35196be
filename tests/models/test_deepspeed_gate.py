"""The ``static`` policy with ``capacity_scope="rank"`` drops what DeepSpeed's top-1 gate drops.

Two things of DeepSpeed's gate are not ours, and the tests below hold both apart from the rest:

* It picks an expert's tokens with ``torch.topk`` over a column of zeros and ones, and torch leaves open which of equal
  values that returns. So *how many* tokens an expert keeps is fixed, and *which* only once ties go by position.
* Its capacity ``ceil(tokens / E * capacity_factor)`` is computed in fp32, ours in fp64 and rounded to six digits.
"""

import numpy as np
import pytest
import torch

from lightning_swiftmoe.functional import route_tokens
from lightning_swiftmoe.layers.dispatchers import VirtualDispatcher
from lightning_swiftmoe.layers.router import Routing
from lightning_swiftmoe.placement import Placement, TokenRule, slot_capacity

pytest.importorskip("deepspeed", reason="needs lightning-swiftmoe[deepspeed]")
from deepspeed.moe import sharded_moe

NUM_RANKS = 2
# Even and uneven tokens per expert, a capacity below, at and above the fair share, one expert alone over its capacity.
CASES = [(tokens, experts, factor) for tokens, experts in [(24, 4), (50, 4), (96, 6)] for factor in (0.5, 1.0, 1.25)]


def draw_logits(num_tokens, num_experts):
    logits = torch.randn(NUM_RANKS * num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens))
    logits[:, 0] += 0.8
    return logits


def our_gate(logits, capacity_factor):
    """``[N * T]`` expert of each token, -1 where dropped, and the gate weights, from a static placement."""
    num_experts = logits.shape[1]
    placement = Placement(np.arange(num_experts).reshape(NUM_RANKS, -1), num_experts)
    routing = Routing(*route_tokens(logits, 1, "softmax", False, None))
    seen = []

    def experts(x, idx, weights):
        seen.append((idx.flatten(), weights.flatten()))
        return x

    VirtualDispatcher(placement, TokenRule("rank", "even"))(
        torch.zeros(len(logits), 1), routing, experts, capacity_factor
    )
    return seen[0]


def deepspeed_gate(logits, capacity_factor):
    """The same of DeepSpeed's gate, run on each rank's tokens alone as DeepSpeed does."""
    parts = [
        sharded_moe.top1gating(part, capacity_factor, 0, use_rts=False, sparse_routes=True)
        for part in logits.chunk(NUM_RANKS)
    ]
    return torch.cat([part[3][0] for part in parts]).long(), torch.cat([part[5][0] for part in parts])


def topk_by_position(values, k, dim):
    """``torch.topk`` with equal values in the order they stand."""
    found = values.sort(dim=dim, descending=True, stable=True)
    return found.values.narrow(dim, 0, int(k)), found.indices.narrow(dim, 0, int(k))


@pytest.mark.parametrize(("num_tokens", "num_experts", "factor"), CASES)
def test_the_same_tokens_are_dropped(num_tokens, num_experts, factor, monkeypatch):
    logits = draw_logits(num_tokens, num_experts)
    monkeypatch.setattr(torch, "topk", topk_by_position)
    expected, expected_weights = deepspeed_gate(logits, factor)
    idx, weights = our_gate(logits, factor)
    assert (expected < 0).any(), "a case without drops shows nothing"
    torch.testing.assert_close(idx, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights[idx >= 0], expected_weights[expected >= 0])


@pytest.mark.parametrize(("num_tokens", "num_experts", "factor"), CASES)
def test_every_rank_and_expert_keeps_as_many_whatever_topk_does_with_ties(num_tokens, num_experts, factor):
    logits = draw_logits(num_tokens, num_experts)
    ours, theirs = our_gate(logits, factor)[0], deepspeed_gate(logits, factor)[0]
    for mine, other in zip(ours.chunk(NUM_RANKS), theirs.chunk(NUM_RANKS), strict=True):
        assert mine[mine >= 0].bincount(minlength=num_experts).tolist() == (
            other[other >= 0].bincount(minlength=num_experts).tolist()
        )


def test_capacities_differ_by_one_at_most_and_only_where_fp32_cannot_tell():
    """100 tokens, 4 experts and a factor of 1.2 are 30 tokens each; in fp32 the product is above 30, and 31."""
    higher = []
    for num_tokens in range(4, 400, 4):
        for factor in (0.5, 0.75, 1.0, 1.1, 1.2, 1.25, 1.5, 2.0, 4.0):
            gates = torch.zeros(num_tokens, 4)
            theirs = int(sharded_moe._capacity(gates, torch.tensor(factor), torch.tensor(0)))
            ours = slot_capacity(factor, num_tokens, 4)
            if theirs != ours:
                higher.append((num_tokens, factor))
                assert theirs == ours + 1
    assert (100, 1.2) in higher
    assert {factor for _, factor in higher} <= {1.1, 1.2}, "factors that fp32 holds exactly give the same capacity"
