"""``MoE`` against its definition: a loop over tokens and their choices, in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_swiftmoe import MoE

NUM_TOKENS, WIDTH, HIDDEN, NUM_EXPERTS = 13, 6, 5, 4


def layer(**kwargs):
    torch.manual_seed(2)
    moe = MoE(WIDTH, HIDDEN, NUM_EXPERTS, **{"aux_loss_coef": 0.3, "z_loss_coef": 0.2, **kwargs}).double()
    with torch.no_grad():
        moe.router.weight.mul_(3)  # decided, so that loads are uneven
        if moe.router.expert_bias is not None:
            moe.router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.4]))
    return moe


def mlp(experts, number, x):
    up, down = getattr(experts, experts.up_name)[number] @ x, experts.down_proj[number]
    if experts.activation == "swiglu":
        gate, up = up[: len(up) // 2], up[len(up) // 2 :]
        return down @ (gate * torch.sigmoid(gate) * up)
    return down @ (up * (1 + torch.erf(up / math.sqrt(2))) / 2)


def route(moe, x):
    """Scores, probabilities and choices of one token."""
    logits = moe.router.weight @ x
    if moe.router.score == "softmax":
        score = prob = logits.exp() / logits.exp().sum()
    else:
        score = 1 / (1 + (-logits).exp())
        prob = score / score.sum()
    ranking = score.detach() if moe.router.expert_bias is None else score.detach() + moe.router.expert_bias
    chosen = sorted(range(NUM_EXPERTS), key=lambda e: -ranking[e].item())[: moe.top_k]
    weights = torch.stack([score[e] for e in chosen])
    if moe.router.normalize_topk:
        weights = weights / weights.sum()
    return logits, prob, list(zip(chosen, weights, strict=True))


def by_hand(moe, x_TD):
    """Outputs, the load-balance loss, the z-loss, and how many assignments were dropped."""
    room = [math.inf] * NUM_EXPERTS
    if moe.capacity_factor is not None:
        room = [math.ceil(moe.capacity_factor * len(x_TD) * moe.top_k / NUM_EXPERTS)] * NUM_EXPERTS
    outputs, z, dropped = [], 0.0, 0
    drawn = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    prob_sum = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for x in x_TD:
        logits, prob, choices = route(moe, x)
        prob_sum = prob_sum + prob
        z = z + torch.log(logits.exp().sum()) ** 2
        y = torch.zeros_like(x) if moe.shared_expert is None else mlp(moe.shared_expert, 0, x)
        for expert, weight in choices:
            drawn[expert] += 1
            if room[expert] > 0:
                room[expert] -= 1
                y = y + weight * mlp(moe.experts, expert, x)
            else:
                dropped += 1
        outputs.append(y)
    aux = NUM_EXPERTS * (drawn / drawn.sum() * prob_sum / len(x_TD)).sum()
    return torch.stack(outputs), aux, z / len(x_TD), dropped


CASES = [
    {"top_k": top_k, "score": score, "normalize_topk": normalize, "capacity_factor": capacity}
    for top_k in (1, 2)
    for score in ("softmax", "sigmoid")
    for normalize in (False, True)
    for capacity in (None, 0.8)
]
CASES += [
    {"top_k": 2, "activation": "swiglu", "shared_ffn_size": 3},
    {"top_k": 2, "bias_update_rate": 0.01, "score": "sigmoid"},
    {"top_k": 3, "capacity_factor": 1.0, "aux_loss_coef": 0.0, "z_loss_coef": 0.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_values_and_all_gradients(case):
    moe = layer(**case)
    x = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(NUM_TOKENS, WIDTH, dtype=torch.float64)
    wanted = dict(moe.named_parameters()) | {"x": x}

    y, aux, z, dropped = by_hand(moe, x)
    assert (dropped > 0) == (moe.capacity_factor is not None)
    whole = (y * direction).sum() + moe.aux_loss_coef * aux + moe.z_loss_coef * z
    expected = torch.autograd.grad(whole, wanted.values())

    got = moe(x)
    (got * direction).sum().backward()
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe.aux_loss, aux.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(moe.z_loss, z.detach(), rtol=1e-12, atol=0)
    for (name, param), grad in zip(wanted.items(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    load = moe.pop_load()
    assert load.counts.sum() == NUM_TOKENS * moe.top_k
    assert load.rank_load.sum() == NUM_TOKENS * moe.top_k - dropped


def test_any_leading_shape():
    moe, x = layer(top_k=2).eval(), torch.randn(2, 3, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(moe(x), moe(x.reshape(-1, WIDTH)).view(x.shape), rtol=0, atol=0)
    assert moe(x[:0]).shape == (0, 3, 4, WIDTH)


def test_drops_keep_the_first_of_the_batch():
    moe = MoE(WIDTH, HIDDEN, 2, capacity_factor=1.0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0, 0] = 1.0
    x = torch.randn(8, WIDTH)
    x[:, 0] = torch.tensor([1.0, 1, -1, 1, 1, 1, 1, 1])  # expert 0 has room for four of seven
    survived = moe(x).abs().sum(dim=1) > 0
    assert survived.tolist() == [True, True, True, True, True, False, False, False]


def steered(num_experts, scale):
    """One-hot tokens, each steered to the expert of its own number."""
    moe = MoE(num_experts, HIDDEN, num_experts)
    with torch.no_grad():
        moe.router.weight.copy_(scale * torch.eye(num_experts))
    return moe


@pytest.mark.parametrize("scale", [0.5, 2.0, 50.0])
def test_aux_loss_is_one_when_balanced(scale):
    moe = steered(4, scale)
    moe(torch.eye(4).repeat(5, 1))
    assert moe.aux_loss.item() == pytest.approx(1.0, abs=1e-6)


def test_aux_loss_is_the_number_of_experts_when_collapsed():
    moe = steered(4, 50.0)
    moe(torch.eye(4)[:1].repeat(20, 1))
    assert moe.aux_loss.item() == pytest.approx(4.0, abs=1e-5)


def test_aux_loss_alone_spreads_the_tokens():
    torch.manual_seed(4)
    moe, x = MoE(WIDTH, HIDDEN, NUM_EXPERTS, aux_loss_coef=1.0), torch.randn(256, WIDTH) + 1.0
    optimizer, largest = torch.optim.SGD(moe.router.parameters(), lr=0.3), []
    for _ in range(60):
        optimizer.zero_grad()
        (moe(x) * 0).sum().backward()
        optimizer.step()
        largest.append(moe.pop_load().counts.max().item())
    assert largest[-1] < 0.75 * largest[0]


def test_loss_free_bias_moves_towards_balance():
    moe = MoE(WIDTH, HIDDEN, NUM_EXPERTS, bias_update_rate=0.005, aux_loss_coef=0.0)
    x, largest = torch.randn(256, WIDTH) + 1.0, []
    for _ in range(100):
        before = moe.router.expert_bias.clone()
        counts = torch.bincount((F.linear(x, moe.router.weight).softmax(-1) + before).argmax(-1), minlength=NUM_EXPERTS)
        moe(x)
        largest.append(counts.max().item())
        moe.router.update_bias(moe.pop_load().counts.sum(0))
        moved = moe.router.expert_bias - before
        torch.testing.assert_close(moved, 0.005 * torch.sign(counts.double().mean() - counts).float())
    assert largest[0] > 1.4 * 64
    assert min(largest[-5:]) < 1.1 * 64


def test_without_a_strategy_the_bias_moves_before_the_next_training_forward():
    moe, x = MoE(WIDTH, HIDDEN, NUM_EXPERTS, bias_update_rate=0.1), torch.randn(32, WIDTH) + 1
    moe(x)
    assert moe.router.expert_bias.eq(0).all()
    moe.eval()(x)
    assert moe.router.expert_bias.eq(0).all()
    moe.train()(x)
    assert moe.router.expert_bias.abs().max() == pytest.approx(0.1)
