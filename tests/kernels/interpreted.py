"""Checks of the Triton kernels in the interpreter. Run as a module in its own process: the switch is read on import.

Sizes are tiny: the interpreter takes milliseconds per block operation.
"""

import sys

import torch
from torch import Tensor

from lightning_swiftmoe.functional import (
    Blocks,
    auxiliary_losses,
    expert_mlp,
    gather_shards,
    pack_shards,
    place_shards,
    route_tokens,
    sum_shards,
)
from lightning_swiftmoe.kernels.expert_mlp import portable
from lightning_swiftmoe.kernels.expert_mlp.activations import (
    activation_backward,
    activation_forward,
    activation_names,
    is_gated,
)
from lightning_swiftmoe.kernels.expert_mlp.row_layout import row_layout, row_layout_reference
from lightning_swiftmoe.kernels.router.route_tokens import auxiliary_losses_reference, route_tokens_reference
from lightning_swiftmoe.kernels.shards.expert_shards import (
    gather_shards_reference,
    pack_shards_reference,
    sum_shards_reference,
)
from lightning_swiftmoe.kernels.token_permute import rows as row_kernels
from lightning_swiftmoe.kernels.token_permute.padded_routing import PaddedRouting, padded_rows, route
from lightning_swiftmoe.placement import EvenShards
from tests.kernels.rows_oracle import (
    check_same_layout,
    loop_over_residents,
    make_case,
    make_layout,
    relative_errors,
    run_rows,
)


def random_routing(tokens: int, top_k: int, experts: int, drop: float = 0.1) -> Tensor:
    idx = torch.rand(tokens, experts).topk(top_k, dim=-1).indices
    return torch.where(torch.rand(tokens, top_k) < drop, -1, idx)


def check_routing(tokens: int, top_k: int, experts: int, tile: int) -> None:
    """Every field against lists built the slow way."""
    idx = random_routing(tokens, top_k, experts)
    routing = route(idx, experts, tile)
    flat, starts, ends, inverse = idx.reshape(-1).tolist(), [0], [], [-1] * idx.numel()
    tile_expert = []
    for expert in range(experts):
        mine = [at for at, named in enumerate(flat) if named == expert]
        for place, at in enumerate(mine):
            inverse[at] = starts[-1] + place
        ends.append(starts[-1] + len(mine))
        tiles = -(-len(mine) // tile)
        tile_expert += [expert] * tiles
        starts.append(starts[-1] + tiles * tile)
    assert routing.starts.tolist() == starts
    assert routing.ends.tolist() == ends
    assert routing.inverse.reshape(-1).tolist() == inverse
    assert routing.tile_expert.tolist()[: len(tile_expert)] == tile_expert
    order = [-1] * starts[-1]
    for at, row in enumerate(inverse):
        if row >= 0:
            order[row] = at
    assert routing.order.tolist()[: starts[-1]] == order
    assert starts[-1] <= padded_rows(idx.numel(), experts, tile) == routing.allocated_rows


def used(rows: Tensor, routing: PaddedRouting) -> Tensor:
    return rows[: int(routing.num_rows)]


def check_rows(tokens: int, top_k: int, experts: int, tile: int, width: int) -> None:
    routing = route(random_routing(tokens, top_k, experts), experts, tile)
    x, weights = torch.randn(tokens, width), torch.rand(tokens, top_k)
    rows = row_kernels.spread_rows(x, routing)
    want = torch.zeros_like(rows)
    for token in range(tokens):
        for choice in range(top_k):
            row = int(routing.inverse[token, choice])
            if row >= 0:
                want[row] = x[token]
    assert torch.equal(used(rows, routing), used(want, routing))
    kept = routing.inverse >= 0
    wide = torch.full((tokens, width + 5), 7.0)
    row_kernels.combine_rows(rows, routing, weights, wide[:, 2:-3])
    torch.testing.assert_close(wide[:, 2:-3], x * (weights * kept).sum(dim=1, keepdim=True))
    assert (wide[:, [0, 1, -3, -2, -1]] == 7).all()
    partials = torch.randn(3, routing.allocated_rows)
    want_grad = torch.where(kept, partials.sum(dim=0)[routing.inverse.clamp_min(0).long()], 0)
    torch.testing.assert_close(row_kernels.router_grad(partials, routing, weights), want_grad)


def check_activation(activation: str) -> None:
    routing = route(torch.tensor([[1], [0], [1], [-1], [0]]), 2, 16)
    width, num_rows = 20, routing.allocated_rows
    pre = 2 * torch.randn(num_rows, width * (2 if is_gated(activation) else 1))
    grad, weights = torch.randn(num_rows, width), torch.rand(5, 1)
    padding = routing.order < 0
    pre[padding], grad[padding] = 0, 0
    scale = torch.where(padding, 0, weights.flatten()[routing.order.clamp(0, 4).long()])
    torch.testing.assert_close(
        used(row_kernels.act_forward(pre, routing, activation), routing),
        used(activation_forward(pre, activation), routing),
    )
    want = activation_backward(pre, grad, scale, activation)
    for overwrite in (False, True):
        grad_pre, hidden, grad_scale = row_kernels.act_backward(
            pre, grad.clone(), weights, routing, activation, pre if overwrite else None
        )
        assert (grad_pre is pre) == overwrite
        for got, expected in zip((grad_pre, hidden, grad_scale[0]), want, strict=True):
            torch.testing.assert_close(used(got, routing), used(expected, routing))


def check_narrow_gelu() -> None:
    """The polynomial behind 16-bit gelu, in fp32, where its error is visible."""
    from lightning_swiftmoe.kernels.expert_mlp import activations_triton
    from lightning_swiftmoe.kernels.expert_mlp.activations import NARROW_GELU_CODE

    pre = torch.linspace(-9, 9, 64).view(16, 4)
    hidden = torch.empty_like(pre)
    activations_triton.act_forward_kernel[(16, 1)](
        pre, hidden, torch.tensor([16], dtype=torch.int32), 4, ACT=NARROW_GELU_CODE, GATED=False, BLOCK=4
    )
    assert (hidden - torch.nn.functional.gelu(pre)).abs().max() < 1e-4


def check_expert_mlp(tokens: int, width: int, hidden: int, experts: int, top_k: int, activation: str) -> None:
    """The whole portable path, forward and backward, against plain torch in fp64."""
    up_rows = hidden * (2 if is_gated(activation) else 1)
    idx = random_routing(tokens, top_k, experts)
    inputs = [
        torch.randn(tokens, width),
        torch.rand(tokens, top_k),
        torch.randn(experts, up_rows, width) / width**0.5,
        torch.randn(experts, width, hidden) / hidden**0.5,
    ]
    grad_y = torch.randn(tokens, width)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        x, weights, up, down = (t.clone().to(dtype).requires_grad_() for t in inputs)
        y = expert_mlp(x, idx, weights, up, down, activation, backend=backend)
        y.backward(grad_y.to(dtype))
        results.append([y.detach(), x.grad, weights.grad, up.grad, down.grad])
    for got, expected in zip(*results, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm() + 1e-30


def check_frozen_experts() -> None:
    """Gradients that nobody needs cost no product, and the others stay the same."""
    idx = random_routing(9, 2, 3)
    x, weights = torch.randn(9, 16), torch.rand(9, 2)
    up, down = torch.randn(3, 32, 16), torch.randn(3, 16, 16)
    calls = []
    whole = portable.weight_gemm
    portable.weight_gemm = lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs)
    grads = []
    for frozen in (False, True):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        leaves += [t.clone().requires_grad_(not frozen) for t in (up, down)]
        expert_mlp(leaves[0], idx, *leaves[1:], "swiglu", backend="triton").square().sum().backward()
        grads.append([t.grad for t in leaves])
    portable.weight_gemm = whole
    assert len(calls) == 2
    assert grads[1][2:] == [None, None]
    assert all(map(torch.equal, grads[0][:2], grads[1][:2]))


def check_router(tokens: int, experts: int, top_k: int, score: str, normalize: bool, biased: bool) -> None:
    """Values and gradients against plain torch in fp64."""
    logits = 3 * torch.randn(tokens, experts)
    bias = torch.randn(experts) if biased else None
    ours, oracle = (logits.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    got = route_tokens(ours, top_k, score, normalize, bias)
    assert "RouteTokens" in got.z_sum.grad_fn.name()  # the kernel, whatever the number of tokens
    want = route_tokens_reference(oracle, bias, top_k, score, normalize)
    assert torch.equal(got.topk_idx, want.topk_idx)
    assert torch.equal(got.counts, want.counts)
    grads = [torch.randn_like(got.topk_weights), torch.randn(experts), torch.randn(())]
    for result, expected in zip(got[1:4], want[1:4], strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(got[1:4], grads)
    torch.autograd.backward(want[1:4], [g.double() for g in grads])
    assert (ours.grad.double() - oracle.grad).norm() <= 2e-6 * oracle.grad.norm()


def check_auxiliary_losses(ranks: int, experts: int, empty: bool) -> None:
    """Values and gradients against plain torch in fp64."""
    counts = torch.randint(0, 50, (ranks, experts)) * (not empty)
    sums = [3 * torch.rand(experts), 40 * torch.rand(())]
    ours, oracle = ([t.clone().to(dtype).requires_grad_() for t in sums] for dtype in (torch.float32, torch.float64))
    got = auxiliary_losses(*ours, counts, 2, 3)
    want = auxiliary_losses_reference(*oracle, counts, 2, 3)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other)
    (0.5 * got[0] + 0.25 * got[1]).backward()
    (0.5 * want[0] + 0.25 * want[1]).backward()
    for one, other in zip(ours, oracle, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad)


def check_shards(residents: int, shapes: list[tuple[int, int]], ranks: int) -> None:
    bounds = shard_bounds(shapes, ranks)
    grads = [torch.randn(residents, rows * cols) for rows, cols in shapes]
    wire = pack_shards(grads, bounds)
    assert torch.equal(wire, pack_shards_reference(grads, bounds))
    placed = [torch.full_like(grad, float("nan")) for grad in grads]
    place_shards(wire, placed, bounds)
    assert all(torch.equal(one, other) for one, other in zip(placed, grads, strict=True))
    blocks = Blocks.of(torch.tensor([2, 0, 2, 2, 4, 0, 2]), 5)
    sizes = [bound[1] for bound in bounds]
    shards = [torch.randn(5, size) for size in sizes]
    sent = gather_shards(shards, blocks, torch.float64)
    assert torch.equal(sent, gather_shards_reference(shards, blocks, torch.float64))
    received = torch.randn(7, sum(sizes))
    got = sum_shards(received, sizes, blocks, 0.5)
    want = sum_shards_reference(received, sizes, blocks, 0.5, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def shard_bounds(shapes: list[tuple[int, int]], ranks: int) -> list[tuple[int, ...]]:
    return [EvenShards(rows, cols, ranks).bounds for rows, cols in shapes]


def check_row_layout(counts: list[int], tile: int) -> None:
    whole = make_layout(counts, tile)
    num_tiles = whole.allocated_rows // tile
    for first, tiles in ((0, num_tiles), (0, 1), (tile, num_tiles - 1), ((num_tiles - 1) * tile, 1)):
        layout = row_layout(whole.starts, whole.ends, tiles * tile, tile, first)
        check_same_layout(layout, row_layout_reference(whole.starts, whole.ends, tiles * tile, tile, first))


def check_rows_mlp(counts: list[int], width: int, hidden: int, activation: str) -> None:
    """Rows in place through the portable GEMMs, into given buffers and not."""
    case = make_case(counts, width, hidden, activation, 16, torch.float32)
    want = loop_over_residents(case, activation)
    for buffers in (False, True):
        got = run_rows(case, activation, "triton", buffers)
        assert max(relative_errors(got, want, int(case.layout.num_rows))) <= 1e-5
    got = run_rows(case, activation, "triton", kept_tiles=1)
    assert max(relative_errors(got, want, int(case.layout.num_rows))) <= 1e-5


def check_partials() -> None:
    layout = make_layout([3, 17], 16)
    partials = torch.randn(3, layout.allocated_rows)
    torch.testing.assert_close(
        row_kernels.sum_partials(partials, layout)[: int(layout.num_rows)], partials.sum(dim=0)[: int(layout.num_rows)]
    )


def check_no_tokens() -> None:
    """Nothing is launched, and gradients are zeros."""
    leaves = [torch.randn(0, 16), torch.rand(0, 2), torch.randn(3, 32, 16), torch.randn(3, 16, 16)]
    x, weights, up, down = (t.requires_grad_() for t in leaves)
    y = expert_mlp(x, torch.empty(0, 2, dtype=torch.int64), weights, up, down, "swiglu", backend="triton")
    y.sum().backward()
    assert y.shape == (0, 16)
    assert not up.grad.any()
    assert not down.grad.any()


CHECKS = {
    "row_layout": lambda: [check_row_layout([1, 0, 2], 4), check_row_layout([0, 0], 4), check_row_layout([40] * 9, 16)],
    "rows_mlp": lambda: [
        check_rows_mlp([5, 0, 18], 24, 20, "swiglu"),
        check_rows_mlp([0, 3], 16, 17, "gelu"),
        check_rows_mlp([0, 0], 16, 16, "swiglu"),
    ],
    "partials": check_partials,
    "no_tokens": check_no_tokens,
    "routing": lambda: [
        check_routing(*case)
        for case in ((1, 1, 1, 16), (5, 2, 3, 4), (90, 3, 7, 16), (512, 2, 200, 16), (205, 5, 6, 16), (1100, 1, 3, 16))
    ],
    "rows": lambda: [check_rows(5, 2, 3, 4, 24), check_rows(30, 3, 7, 16, 9)],
    "activations": lambda: [check_activation(name) for name in activation_names()],
    "narrow_gelu": check_narrow_gelu,
    "expert_mlp": lambda: [
        check_expert_mlp(1, 16, 16, 3, 3, "swiglu"),
        check_expert_mlp(21, 24, 20, 5, 2, "swiglu"),
        check_expert_mlp(9, 16, 17, 2, 1, "gelu"),
    ],
    "frozen": check_frozen_experts,
    "router": lambda: [
        check_router(tokens, experts, top_k, score, normalize, biased)
        for tokens, experts, top_k in ((0, 5, 2), (1, 1, 1), (300, 16, 1), (70, 60, 4))
        for score, normalize, biased in (("softmax", False, False), ("softmax", True, True), ("sigmoid", True, True))
    ],
    "losses": lambda: [
        check_auxiliary_losses(ranks, experts, empty)
        for ranks, experts in ((1, 1), (3, 7), (2, 16))
        for empty in (False, True)
    ],
    "shards": lambda: [check_shards(3, [(5, 2), (4, 3)], 3), check_shards(2, [(5, 1)], 8)],
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        print(name, flush=True)
        CHECKS[name]()
