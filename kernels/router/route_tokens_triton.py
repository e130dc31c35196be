"""The router after its scores, one program for a block of tokens; the twin of `route_tokens_reference`. No atomics.

Shape legend: T tokens, E experts in a vector of BINS >= E, k choices in a vector of CHOICES >= k.
"""

import triton
import triton.language as tl

from lightning_swiftmoe.kernels.launch import Launcher

_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _scores(logits, token, expert, num_tokens, E, SIGMOID: tl.constexpr):
    """Softmax, score, routing probability and log-sum-exp of a block; experts from E on have none of them."""
    inside = (expert < E)[None, :]
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    logit = tl.load(logits + at, mask=(token < num_tokens)[:, None] & inside, other=0.0)
    logit = tl.where(inside, logit, -float("inf"))
    top = tl.max(logit, axis=1)
    power = tl.exp(logit - top[:, None])
    total = tl.sum(power, axis=1)
    softmax = power / total[:, None]
    if SIGMOID:
        score = tl.where(inside, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
        return softmax, score, score / tl.sum(score, axis=1)[:, None], top + tl.log(total)
    return softmax, softmax, softmax, top + tl.log(total)


@triton.jit(do_not_specialize=["num_tokens"])
def route_tokens_kernel(
    logits, bias, topk_idx, topk_weights, sums, counts, num_tokens, E,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Choices and weights of a block of tokens, and its share of the sums: `sums[b, :E]` probabilities, `sums[b, E]`
    squared log-sum-exp, `counts[b, :E]` choices. Of equal scores the expert with the lower number is chosen."""
    block = tl.program_id(0).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BINS)
    choices = tl.arange(0, CHOICES)
    live = token < num_tokens
    _, score, prob, lse = _scores(logits, token, expert, num_tokens, E, SIGMOID)
    left = score
    if bias is not None:
        left += tl.load(bias + expert, mask=expert < E, other=0.0)[None, :]
    left = tl.where((expert < E)[None, :], left, -float("inf"))
    weights = tl.zeros([BLOCK, CHOICES], tl.float32)
    chosen = tl.zeros([BLOCK, BINS], tl.int32)
    first = token.to(tl.int64) * TOP_K
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=1)
        hit = expert[None, :] == best[:, None]
        tl.store(topk_idx + first + choice, best.to(tl.int64), mask=live)
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
        weights = tl.where((choices == choice)[None, :], weight[:, None], weights)
        chosen += hit.to(tl.int32)
        left = tl.where(hit, -float("inf"), left)
    if NORMALIZE:
        weights /= tl.maximum(tl.sum(weights, axis=1), _TINY)[:, None]
    tl.store(topk_weights + first[:, None] + choices[None, :], weights, mask=live[:, None] & (choices < TOP_K)[None, :])
    real = live[:, None]
    tl.store(sums + block * (E + 1) + expert, tl.sum(tl.where(real, prob, 0.0), axis=0), mask=expert < E)
    tl.store(sums + block * (E + 1) + E, tl.sum(tl.where(live, lse * lse, 0.0)))
    tl.store(counts + block * E + expert, tl.sum(tl.where(real, chosen, 0), axis=0), mask=expert < E)


@triton.jit(do_not_specialize=["num_tokens"])
def route_tokens_grad_kernel(
    logits, topk_idx, grad_weights, grad_prob_sum, grad_z_sum, grad_logits, num_tokens, E,
    TOP_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from those of weights, summed probabilities and summed squared log-sum-exp; the last two
    may be None."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BINS)
    live = token < num_tokens
    softmax, score, prob, lse = _scores(logits, token, expert, num_tokens, E, SIGMOID)
    first = token.to(tl.int64) * TOP_K
    total = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        for choice in tl.static_range(TOP_K):
            hit = expert[None, :] == tl.load(topk_idx + first + choice, mask=live, other=0)[:, None]
            value = tl.sum(tl.where(hit, score, 0.0), axis=1)
            total += value
            along += value * tl.load(grad_weights + first + choice, mask=live, other=0.0)
        total = tl.maximum(total, _TINY)
        along /= total
    grad = tl.zeros([BLOCK, BINS], tl.float32)
    for choice in tl.static_range(TOP_K):
        hit = expert[None, :] == tl.load(topk_idx + first + choice, mask=live, other=0)[:, None]
        value = tl.load(grad_weights + first + choice, mask=live, other=0.0)
        if NORMALIZE:
            value = (value - along) / total
        grad += tl.where(hit, value[:, None], 0.0)
    grad_prob = tl.zeros([1, BINS], tl.float32)
    if grad_prob_sum is not None:
        grad_prob = tl.load(grad_prob_sum + expert, mask=expert < E, other=0.0)[None, :]
    if SIGMOID:
        mean = tl.sum(prob * grad_prob, axis=1)[:, None]
        grad += (grad_prob - mean) / tl.sum(score, axis=1)[:, None]
        grad *= score * (1.0 - score)
    else:
        grad += grad_prob
        grad = softmax * (grad - tl.sum(softmax * grad, axis=1)[:, None])
    if grad_z_sum is not None:
        grad += 2.0 * tl.load(grad_z_sum) * lse[:, None] * softmax
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(grad_logits + at, grad, mask=live[:, None] & (expert < E)[None, :])


@triton.jit(do_not_specialize=["N", "scale"])
def auxiliary_losses_kernel(prob_sum, z_sum, counts, out, N, E, scale, BINS: tl.constexpr):
    """`out` is the load-balance loss, the z-loss, the derivative of the second by `z_sum` and of the first by
    `prob_sum[e]`."""
    expert = tl.arange(0, BINS)
    inside = expert < E
    chosen = tl.zeros([BINS], tl.int64)
    for rank in range(0, N):
        chosen += tl.load(counts + rank * E + expert, mask=inside, other=0)
    total = tl.maximum(tl.sum(chosen, axis=0), 1).to(tl.float32)
    slope = scale.to(tl.float32) * E * (chosen.to(tl.float32) / total) / total
    prob = tl.load(prob_sum + expert, mask=inside, other=0.0)
    tl.store(out, tl.sum(prob * slope, axis=0))
    z_slope = scale.to(tl.float32) / total
    tl.store(out + 1, tl.load(z_sum) * z_slope)
    tl.store(out + 2, z_slope)
    tl.store(out + 3 + expert, slope, mask=inside)


route_tokens = Launcher(route_tokens_kernel)
route_tokens_grad = Launcher(route_tokens_grad_kernel)
auxiliary_losses = Launcher(auxiliary_losses_kernel)
