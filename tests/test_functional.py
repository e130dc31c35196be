"""`expert_mlp` against a dense oracle that autograd differentiates, on every dtype and awkward shape."""

import math

import pytest
import torch
from torch import Tensor

from lightning_swiftmoe.functional import (
    Blocks,
    activation_names,
    expert_mlp,
    gather_shards,
    is_gated,
    pack_shards,
    place_shards,
    route_tokens,
    sum_shards,
)
from lightning_swiftmoe.placement import EvenShards

ELEMENTWISE = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda z: torch.relu(z) ** 2,
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def oracle(x: Tensor, idx: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Every expert on every token, then the chosen ones: slow, and with nothing in common with the code under test."""
    pre = torch.einsum("td,ehd->eth", x, up)
    if activation in GATES:
        gate, linear = pre.chunk(2, dim=-1)
        hidden = ELEMENTWISE[GATES[activation]](gate) * linear
    else:
        hidden = ELEMENTWISE[activation](pre)
    outputs = torch.einsum("eth,edh->etd", hidden, down)
    chosen = torch.nn.functional.one_hot(idx + 1, up.shape[0] + 1)[..., 1:].to(x.dtype)
    return torch.einsum("tke,tk,etd->td", chosen, weights, outputs)


def make_inputs(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, activation: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    up_rows = hidden * (2 if is_gated(activation) else 1)
    scores = torch.rand(tokens, experts, generator=rng)
    return {
        "x": torch.randn(tokens, width, generator=rng, dtype=torch.float64).to(dtype),
        "idx": scores.topk(top_k, dim=-1).indices,
        "weights": torch.rand(tokens, top_k, generator=rng, dtype=torch.float64).to(
            torch.promote_types(dtype, torch.float32)
        ),
        "up": (torch.randn(experts, up_rows, width, generator=rng, dtype=torch.float64) / width**0.5).to(dtype),
        "down": (torch.randn(experts, width, hidden, generator=rng, dtype=torch.float64) / hidden**0.5).to(dtype),
    }


def run_with_grads(function, inputs: dict[str, Tensor], activation: str, grad_y: Tensor, **kwargs) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in inputs.items() if n != "idx"}
    y = function(leaves["x"], inputs["idx"], leaves["weights"], leaves["up"], leaves["down"], activation, **kwargs)
    y.backward(grad_y.to(y.dtype))
    return [y.detach(), *(leaves[n].grad for n in ("x", "weights", "up", "down"))]


def assert_matches_oracle(inputs: dict[str, Tensor], activation: str, tolerance: float, **kwargs) -> None:
    rng = torch.Generator().manual_seed(7)
    grad_y = torch.randn(inputs["x"].shape, generator=rng, dtype=torch.float64).to(inputs["x"].dtype)
    got = run_with_grads(expert_mlp, inputs, activation, grad_y, **kwargs)
    wide = {n: t if n == "idx" else t.double() for n, t in inputs.items()}
    want = run_with_grads(oracle, wide, activation, grad_y.double())
    for name, result, expected in zip(("y", "x", "weights", "up", "down"), got, want, strict=True):
        error = (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance}"


@pytest.mark.parametrize("activation", activation_names())
def test_fp64_matches_oracle_for_every_activation(activation: str) -> None:
    assert_matches_oracle(make_inputs(13, 6, 5, 5, 2, activation, torch.float64), activation, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_narrow_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    assert_matches_oracle(make_inputs(29, 16, 24, 4, 2, "swiglu", dtype), "swiglu", tolerance)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 7, 1), (1, 7, 7), (5, 3, 3), (2, 13, 2), (40, 1, 1)], ids=str
)
def test_odd_shapes(tokens: int, experts: int, top_k: int) -> None:
    assert_matches_oracle(make_inputs(tokens, 5, 7, experts, top_k, "gelu", torch.float64), "gelu", 1e-12)


def test_dropped_assignments_add_nothing() -> None:
    inputs = make_inputs(17, 6, 5, 4, 2, "swiglu", torch.float64)
    inputs["idx"][::3, 1] = -1
    inputs["idx"][4] = -1
    assert_matches_oracle(inputs, "swiglu", 1e-12)
    y, grad_x, grad_weights, *_ = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(17, 6, dtype=torch.float64))
    assert not y[4].any()
    assert not grad_x[4].any()
    assert not grad_weights[inputs["idx"] == -1].any()


def test_all_dropped() -> None:
    inputs = make_inputs(5, 6, 5, 4, 2, "gelu", torch.float32)
    inputs["idx"].fill_(-1)
    results = run_with_grads(expert_mlp, inputs, "gelu", torch.ones(5, 6))
    assert all(not result.any() for result in results)


def test_slots_layout_with_unused_experts() -> None:
    """The strategy's path: k = 1, unit weights, sorted slots, more slots than used."""
    inputs = make_inputs(9, 6, 5, 8, 1, "swiglu", torch.float32)
    inputs["idx"] = torch.tensor([1, 1, 1, 3, 3, 6, 6, 6, 6], dtype=torch.int32).unsqueeze(1)
    inputs["weights"].fill_(1)
    results = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(9, 6))
    unused = [0, 2, 4, 5, 7]
    assert not results[3][unused].any()
    assert not results[4][unused].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    inputs = make_inputs(0, 6, 5, 4, 2, "swiglu", dtype)
    y, grad_x, grad_weights, grad_up, grad_down = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(0, 6))
    assert y.shape == grad_x.shape == (0, 6)
    assert grad_weights.shape == (0, 2)
    assert grad_up.shape == inputs["up"].shape
    assert not grad_up.any()
    assert not grad_down.any()


def test_autocast_casts_projections_but_not_router_weights() -> None:
    inputs = make_inputs(11, 8, 8, 4, 2, "swiglu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(11, 8))
    assert got[0].dtype == torch.bfloat16
    assert [g.dtype for g in got[1:]] == [torch.float32] * 4
    narrow = {n: t.bfloat16() if n in ("x", "up", "down") else t for n, t in inputs.items()}
    want = run_with_grads(expert_mlp, narrow, "swiglu", torch.ones(11, 8))
    for result, expected in zip(got, want, strict=True):
        torch.testing.assert_close(result, expected.to(result.dtype), rtol=0, atol=0)


def test_same_bits_twice() -> None:
    inputs = make_inputs(64, 16, 24, 4, 2, "swiglu", torch.float32)
    first = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(64, 16))
    second = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(64, 16))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpoint_gives_the_same_gradients() -> None:
    inputs = make_inputs(12, 8, 8, 4, 2, "swiglu", torch.float64)
    grad_y = torch.ones(12, 8, dtype=torch.float64)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(expert_mlp, *args, use_reentrant=False)

    plain = run_with_grads(expert_mlp, inputs, "swiglu", grad_y)
    again = run_with_grads(checkpointed, inputs, "swiglu", grad_y)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compile_without_graph_break() -> None:
    inputs = make_inputs(12, 8, 8, 4, 2, "swiglu", torch.float32)
    compiled = torch.compile(expert_mlp, backend="aot_eager", fullgraph=True)
    plain = run_with_grads(expert_mlp, inputs, "swiglu", torch.ones(12, 8))
    traced = run_with_grads(compiled, inputs, "swiglu", torch.ones(12, 8))
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_custom_op_contract() -> None:
    inputs = make_inputs(6, 8, 8, 4, 2, "swiglu", torch.float64)
    args = [t if n == "idx" else t.requires_grad_() for n, t in inputs.items()]
    torch.library.opcheck(torch.ops.lightning_swiftmoe.expert_mlp_forward.default, (*args, "swiglu", "torch"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "valid names: swiglu"),
        ({"backend": "cuda"}, "valid names: auto"),
        ({"activation": "gelu"}, "wants up_proj"),
        ({"idx": torch.full((4, 2), 9)}, r"\[-1, 4\)"),
        ({"idx": torch.zeros(4, 2)}, "int32 or int64"),
        ({"idx": torch.zeros(4, 1, dtype=torch.int64)}, "topk_idx and topk_weights"),
        ({"x": torch.zeros(4, 8, dtype=torch.bfloat16)}, "share one floating dtype"),
        ({"x": torch.zeros(4, 1, 8)}, "want x"),
        ({"weights": torch.zeros(4, 2, dtype=torch.int64)}, "must be floating"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    inputs = make_inputs(4, 8, 8, 4, 2, "swiglu", torch.float32)
    args = {**inputs, "activation": "swiglu", "backend": "auto", **change}
    with pytest.raises(ValueError, match=message):
        expert_mlp(*args.values())


@pytest.mark.parametrize("shapes", [[(10, 1)], [(5, 6), (6, 5)], [(1, 3), (7, 2)]])
@pytest.mark.parametrize("num_ranks", [1, 3, 4, 8])
def test_pack_then_place_is_the_identity(shapes: list[tuple[int, int]], num_ranks: int) -> None:
    bounds = [EvenShards(*shape, num_ranks).bounds for shape in shapes]
    grads = [torch.randn(3, rows * cols) for rows, cols in shapes]
    wire = pack_shards(grads, bounds)
    sent = []
    for rank in range(num_ranks):
        parts = [grad[:, bound[rank] : bound[rank + 1]] for grad, bound in zip(grads, bounds, strict=True)]
        sent.append(torch.cat(parts, dim=1).flatten())
    torch.testing.assert_close(wire, torch.cat(sent), rtol=0, atol=0)
    placed = [torch.full_like(grad, float("nan")) for grad in grads]
    place_shards(wire, placed, bounds)
    for one, other in zip(placed, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_shards_cast_on_the_way() -> None:
    bounds = [(0, 5, 9)]
    grads = torch.randn(2, 9)
    placed = torch.empty(2, 9, dtype=torch.bfloat16)
    place_shards(pack_shards([grads], bounds), [placed], bounds)
    torch.testing.assert_close(placed, grads.bfloat16(), rtol=0, atol=0)


def test_gather_shards_puts_parameters_side_by_side() -> None:
    shards = [torch.randn(3, 2), torch.randn(3, 4)]
    sent = gather_shards(shards, Blocks.of(torch.tensor([2, 0, 2]), 3), torch.bfloat16)
    expected = torch.cat([shard[[2, 0, 2]] for shard in shards], dim=1).bfloat16()
    torch.testing.assert_close(sent, expected, rtol=0, atol=0)


def test_sum_shards_adds_wide_and_in_source_order() -> None:
    # In fp32, (1 + 2**-24) + 2**-24 is 1, but 2**-24 + 2**-24 + 1 is not: the order shows.
    tiny = 2.0**-24
    arrived = torch.tensor([[1.0, tiny], [5.0, 5.0], [tiny, tiny], [tiny, 1.0]])
    blocks = Blocks.of(torch.tensor([2, 0, 2, 2]), 4)
    (total,) = sum_shards(arrived, [2], blocks)
    assert total[2].tolist() == [1.0, 1.0 + 2 * tiny]
    assert total[0].tolist() == [5.0, 5.0]
    assert not total[[1, 3]].any()
    left, right = sum_shards(arrived, [1, 1], blocks, scale=0.5)
    assert torch.equal(torch.cat([left, right], dim=1), total / 2)
    # bf16 blocks are added in fp32: 256 + 1 is not a bf16 number, but it is the sum.
    (wide,) = sum_shards(torch.tensor([[256.0], [1.0]]).bfloat16(), [1], Blocks.of(torch.tensor([0, 0]), 1))
    assert wide.item() == 257.0


def test_router_by_hand():
    """Two tokens, three experts: the bias changes who is chosen, the weights are those of the scores alone."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)) + 1.5
    plain = route_tokens(logits, 1)
    assert plain.topk_idx.tolist() == [[0], [2]]
    assert plain.topk_weights.tolist() == [[pytest.approx(0.5)], [pytest.approx(0.7)]]
    assert plain.prob_sum.tolist() == pytest.approx([0.6, 0.5, 0.9])
    assert plain.z_sum.item() == pytest.approx(2 * 1.5**2)
    assert plain.counts.tolist() == [1, 0, 1]
    biased = route_tokens(logits, 2, normalize=True, bias=torch.tensor([0.0, 0.0, 1.0]))
    assert biased.topk_idx.tolist() == [[2, 0], [2, 1]]
    assert biased.topk_weights.flatten().tolist() == pytest.approx([2 / 7, 5 / 7, 7 / 9, 2 / 9])
    assert biased.counts.tolist() == [1, 1, 2]
    sigmoid = route_tokens(torch.tensor([[0.0, 10.0]]), 1, "sigmoid")
    assert sigmoid.topk_weights.item() == pytest.approx(1 / (1 + math.exp(-10)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 4}, "1 <= top_k <= E"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, "fp32 or fp64"),
        ({"score": "tanh"}, "unknown score 'tanh'; valid names: softmax, sigmoid"),
        ({"bias": torch.zeros(2)}, r"want bias\[3\], got \(2,\)"),
    ],
)
def test_router_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        route_tokens(**{"logits": torch.zeros(2, 3), "top_k": 1, **change})
