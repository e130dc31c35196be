"""The GPU paths against fp64, with everything that only a GPU can show. Run with `pytest -m gpu`."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_swiftmoe.functional import (
    Blocks,
    expert_mlp,
    gather_shards,
    is_gated,
    pack_shards,
    place_shards,
    route_tokens,
    sum_shards,
)
from lightning_swiftmoe.kernels import dispatch
from lightning_swiftmoe.kernels.expert_mlp import reference
from lightning_swiftmoe.kernels.router.route_tokens import route_tokens_reference
from lightning_swiftmoe.kernels.shards.expert_shards import (
    gather_shards_reference,
    pack_shards_reference,
    sum_shards_reference,
)
from lightning_swiftmoe.kernels.shards.peer_shards import (
    Residents,
    pull_shards,
    pull_shards_reference,
    push_shards,
    push_shards_reference,
)
from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses
from lightning_swiftmoe.kernels.token_permute.routing import route_reference
from lightning_swiftmoe.placement import EvenShards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `torch.empty` gives is NaN, or for integers absurd, until a kernel writes it."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def make_inputs(
    tokens: int, width: int, hidden: int, experts: int, top_k: int, activation: str, dtype: torch.dtype, skew: str = ""
) -> tuple[Tensor, ...]:
    rng = torch.Generator(device=CUDA).manual_seed(tokens + experts)
    rows = hidden * (2 if is_gated(activation) else 1)
    scores = torch.rand(tokens, experts, device=CUDA, generator=rng)
    if skew == "zipf":
        scores = -torch.log(-torch.log(scores)) - torch.arange(1, experts + 1, device=CUDA).log()
    idx = scores.topk(top_k, dim=-1).indices
    if skew == "one_hot":
        idx = torch.arange(top_k, device=CUDA).expand(tokens, top_k) + experts - top_k
    if skew == "dropped":
        idx[::3, 0] = -1
    return (
        torch.randn(tokens, width, device=CUDA, generator=rng).to(dtype),
        idx,
        torch.rand(tokens, top_k, device=CUDA, generator=rng),
        (torch.randn(experts, rows, width, device=CUDA, generator=rng) / width**0.5).to(dtype),
        (torch.randn(experts, width, hidden, device=CUDA, generator=rng) / hidden**0.5).to(dtype),
    )


def step(inputs: tuple[Tensor, ...], activation: str, backend: str = "auto", function=expert_mlp) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    y = function(*leaves, activation, backend)
    grad_y = torch.randn(y.shape, device=CUDA, generator=torch.Generator(device=CUDA).manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad_y)]


def oracle(inputs: tuple[Tensor, ...], activation: str) -> list[Tensor]:
    x, idx, weights, up, down = (t.double() if t.is_floating_point() else t for t in inputs)
    grad_y = torch.randn(x.shape, device=CUDA, generator=torch.Generator(device=CUDA).manual_seed(1))
    grad_y = grad_y.to(inputs[0].dtype).double()
    routing = route_reference(idx, up.shape[0])
    y, pre = reference.expert_mlp_forward(x, weights, up, down, routing, activation)
    return [y, *reference.expert_mlp_backward(grad_y, x, weights, up, down, pre, routing, activation)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, result, expected in zip(("y", "x", "weights", "up", "down"), got, want, strict=True):
        error = float((result.double() - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance}"


SHAPES = [
    (1, 128, 128, 7, 7, "swiglu", ""),  # one token, every expert, prime E
    (37, 128, 256, 16, 2, "reglu", ""),  # less than a tile, experts without tokens
    (700, 256, 384, 5, 2, "swiglu", "dropped"),
    (1000, 512, 640, 16, 1, "gelu", ""),
    (3000, 768, 1536, 64, 4, "geglu", "zipf"),
    (513, 192, 320, 3, 3, "relu2", ""),  # weight gradients that our tile does not divide
    (640, 256, 256, 9, 1, "geglu_tanh", "one_hot"),
    (300, 128, 192, 4, 2, "silu", "zipf"),
    (300, 128, 128, 4, 2, "relu", "dropped"),
    (300, 128, 128, 4, 2, "gelu_tanh", ""),
    (211, 104, 136, 6, 2, "swiglu", "dropped"),  # sizes the Hopper path does not take
    (211, 37, 51, 6, 2, "swiglu", ""),  # strides grouped_mm does not take
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_all_gradients_match_fp64(case: tuple, dtype: torch.dtype, backend: str) -> None:
    *sizes, activation, skew = case
    inputs = make_inputs(*sizes, activation, dtype, skew)
    want = oracle(inputs, activation)
    assert_close(step(inputs, activation, backend), want, TOLERANCE[dtype])


def test_no_worse_than_twice_the_error_of_torch() -> None:
    inputs = make_inputs(2048, 512, 1024, 8, 2, "swiglu", torch.bfloat16)
    want = oracle(inputs, "swiglu")
    for ours, torchs, expected in zip(step(inputs, "swiglu"), step(inputs, "swiglu", "torch"), want, strict=True):
        assert (ours.double() - expected).norm() <= 2 * (torchs.double() - expected).norm()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("skew", ["", "zipf", "one_hot"])
def test_same_bits_on_every_run(skew: str, backend: str) -> None:
    dtype = torch.bfloat16 if backend == "auto" else torch.float32
    inputs = make_inputs(4096, 256, 512, 16, 2, "swiglu", dtype, skew)
    first = step(inputs, "swiglu", backend)
    for _ in range(3):
        again = step(inputs, "swiglu", backend)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    inputs = make_inputs(0, 128, 128, 4, 2, "swiglu", dtype)
    y, grad_x, grad_weights, grad_up, grad_down = step(inputs, "swiglu")
    assert y.shape == grad_x.shape == (0, 128)
    assert grad_weights.shape == (0, 2)
    assert not grad_up.any()
    assert not grad_down.any()


def test_compiled_without_graph_break() -> None:
    inputs = make_inputs(512, 256, 384, 8, 2, "swiglu", torch.bfloat16)
    compiled = torch.compile(expert_mlp, fullgraph=True)
    for got, want in zip(step(inputs, "swiglu", function=compiled), step(inputs, "swiglu"), strict=True):
        assert torch.equal(got, want)


def test_captured_in_a_cuda_graph_with_new_routing() -> None:
    """No host synchronisation: a graph captured on one routing replays another."""
    inputs = make_inputs(1024, 256, 384, 8, 2, "swiglu", torch.bfloat16)
    other = make_inputs(1024, 256, 384, 8, 2, "swiglu", torch.bfloat16, "zipf")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(inputs, "swiglu")
    torch.cuda.synchronize()
    static = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    grad_y = torch.randn_like(inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = expert_mlp(*static, "swiglu")
        grads = torch.autograd.grad(y, [t for t in static if t.requires_grad], grad_y)
    for source in (inputs, other):
        with torch.no_grad():
            for held, new in zip(static, source, strict=True):
                held.copy_(new)
        graph.replay()
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in source]
        want_y = expert_mlp(*leaves, "swiglu")
        want = torch.autograd.grad(want_y, [t for t in leaves if t.requires_grad], grad_y)
        assert all(torch.equal(a, b) for a, b in zip((y, *grads), (want_y, *want), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [256, 192])  # of whole tiles of weight gradients, and not
def test_no_host_synchronisation(dtype: torch.dtype, width: int) -> None:
    inputs = make_inputs(1024, width, 384, 8, 2, "swiglu", dtype)
    step(inputs, "swiglu")
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    grad_y = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = expert_mlp(*leaves, "swiglu")
        torch.autograd.grad(y, [t for t in leaves if t.requires_grad], grad_y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_offsets_beyond_two_to_the_31(backend: str) -> None:
    """Pre-activations of more than 2**31 elements; the last tokens are compared with the same tokens alone."""
    tokens, width, hidden = 2**17, 128, 8192 + 256
    dtype = torch.bfloat16 if backend == "auto" else torch.float16
    inputs = make_inputs(tokens, width, hidden, 2, 1, "swiglu", dtype)
    assert tokens * 2 * hidden > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    x, idx, weights, up, down = inputs
    y, grad_x, grad_weights, *_ = step(inputs, "swiglu", backend)
    last = slice(tokens - 256, tokens)
    routing = route_reference(idx[last], 2)
    want, _ = reference.expert_mlp_forward(
        x[last].double(), weights[last].double(), up.double(), down.double(), routing, "swiglu"
    )
    assert (y[last].double() - want).norm() <= 1e-2 * want.norm()
    assert grad_x.isfinite().all()
    assert grad_weights.isfinite().all()


def test_paths_are_the_ones_documented() -> None:
    if torch.cuda.get_device_capability()[0] == 9:
        assert dispatch.choose_path(CUDA, torch.bfloat16, 2048, 768, 128, "swiglu", "auto") == "hopper"
    assert dispatch.choose_path(CUDA, torch.bfloat16, 104, 136, 6, "swiglu", "auto") == "grouped_mm"
    assert dispatch.choose_path(CUDA, torch.float64, 128, 128, 4, "swiglu", "triton") == "torch"


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (32768, 16, 1), (5001, 60, 4), (1000, 128, 8), (300, 1000, 6)]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_router_matches_fp64(tokens: int, experts: int, top_k: int, score: str, biased: bool) -> None:
    logits = 2 * torch.randn(tokens, experts, device=CUDA)
    bias = torch.randn(experts, device=CUDA) if biased else None
    ours, oracle = (logits.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = route_tokens(ours, top_k, score, top_k > 1, bias)
        grads = [torch.randn_like(g) for g in got[1:4]]
        (grad,) = torch.autograd.grad(got[1:4], ours, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Scores that differ by less than a rounding may swap places: compare what was chosen, not which.
    scores = (logits.double().softmax(-1) if score == "softmax" else logits.double().sigmoid()).detach()
    choice = scores if bias is None else scores + bias.double()
    want_choice = choice.topk(top_k, dim=-1).values
    torch.testing.assert_close(choice.gather(1, got.topk_idx), want_choice, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.counts, torch.bincount(got.topk_idx.flatten(), minlength=experts))
    want = route_tokens_reference(oracle, bias, top_k, score, top_k > 1)
    (want_grad,) = torch.autograd.grad(want[1:4], oracle, [g.double() for g in grads])
    same = (got.topk_idx == want.topk_idx).all(dim=1)
    assert same.float().mean() > 0.99
    for result, expected in ((got.topk_weights[same], want.topk_weights[same]), (grad[same], want_grad[same])):
        assert (result.double() - expected).norm() <= 1e-5 * expected.norm()
    for result, expected in ((got.prob_sum, want.prob_sum), (got.z_sum, want.z_sum)):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    again = route_tokens(logits, top_k, score, top_k > 1, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(("residents", "elements", "ranks"), [(3, 10, 3), (5, 100_003, 8), (2, 5, 8)])
def test_shards_match_their_reference(residents: int, elements: int, ranks: int) -> None:
    bounds = [EvenShards(elements, 2, ranks).bounds, EvenShards(3, elements, ranks).bounds]
    grads = [torch.randn(residents, bound[-1], device=CUDA) for bound in bounds]
    wire = pack_shards(grads, bounds)
    assert torch.equal(wire, pack_shards_reference(grads, bounds))
    placed = [torch.empty_like(grad, dtype=torch.bfloat16) for grad in grads]
    place_shards(wire, placed, bounds)
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(placed, grads, strict=True))
    sizes = [bound[1] for bound in bounds]
    blocks = Blocks.of(torch.tensor([2, 0, 2, 2, 4, 0, 2, 4, 4]), 6).to(CUDA)
    shards = [torch.randn(6, size, device=CUDA) for size in sizes]
    sent = gather_shards(shards, blocks, torch.bfloat16)
    assert torch.equal(sent, gather_shards_reference(shards, blocks, torch.bfloat16))
    got = sum_shards(sent, sizes, blocks, 0.5)
    want = sum_shards_reference(sent, sizes, blocks, 0.5, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cut", [EvenShards(768, 4096, 2), EvenShards(33, 7, 4)])
def test_shards_through_peers_match_their_reference(cut: EvenShards, dtype: torch.dtype) -> None:
    """Ranks of one device: an address is an address."""
    experts = [[0, 2], [2], [0, 1, 2, 3], [3]][: cut.num_ranks]
    places = Residents.of(experts, 4)
    within = Residents.within(places.pack(room=20).to(CUDA), 4)
    held = [torch.randn(4, cut.num_elements, device=CUDA).to(dtype) for _ in experts]
    expected = [tensor.clone() for tensor in held]
    addresses = peer_addresses([tensor.data_ptr() for tensor in held], torch.device(CUDA))
    for start, stop in pairwise(cut.bounds):
        shard = torch.randn(4, stop - start, device=CUDA)
        push_shards(shard, within, addresses, cut.num_elements, start, dtype)
        push_shards_reference(shard, places, expected, start)
    assert all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))
    for start, stop in pairwise(cut.bounds):
        total = torch.empty(4, stop - start, device=CUDA)
        oracle = torch.empty_like(total)
        pull_shards(total, within, addresses, cut.num_elements, start, dtype, 0.5)
        pull_shards_reference(oracle, places, held, start, 0.5)
        assert torch.equal(total, oracle)


def test_shards_of_an_expert_of_mixtral() -> None:
    """117 M elements: more blocks than the second axis of a grid may have."""
    bounds = [EvenShards(28_672, 4_096, 2).bounds]
    grads = torch.randn(1, bounds[0][-1], device=CUDA, dtype=torch.bfloat16)
    placed = torch.empty_like(grads)
    place_shards(pack_shards([grads], bounds), [placed], bounds)
    assert torch.equal(placed, grads)
