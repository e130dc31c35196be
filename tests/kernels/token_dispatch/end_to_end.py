"""Several ranks in one process: plan, move, apply a fake expert, move back, and compare with computing directly.

Shape legend: T tokens, k choices, d width, N ranks, P padded rows, A arrivals.
"""

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.indirect import point, pointed
from lightning_swiftmoe.kernels.token_dispatch import move, move_reference
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.token_plan import PlanSize, TokenPlan
from tests.kernels.token_dispatch.cases import Case

NAN = float("nan")


class Cluster:
    """A case with tokens and weights on every rank; the plans and addresses of all ranks."""

    def __init__(self, case: Case, size: PlanSize, width: int, device: str = "cpu") -> None:
        self.case, self.size, self.width, self.device = case, size, width, device
        idx = [i.to(device) for i in case.topk_idx]
        self.x = [torch.randn(i.shape[0], width, device=device) for i in idx]
        self.weights = [torch.rand(i.shape, device=device) for i in idx]
        tensors, turns = case.tensors(device), case.turns(device)
        self.plans = [plan_tokens(*tensors, rank, size, case.capacity, turns) for rank in range(len(idx))]
        self.addresses = [address_tokens(i, plan) for i, plan in zip(idx, self.plans, strict=True)]

    def want(self, rank: int) -> Tensor:
        """The weighted sum of fake experts over kept assignments."""
        idx, kept = self.case.topk_idx[rank].tolist(), self.case.kept[rank].tolist()
        out, seen = torch.zeros_like(self.x[rank]), [0] * len(kept)
        for token, choices in enumerate(idx):
            for choice, expert in enumerate(choices):
                if expert < 0:
                    continue
                if seen[expert] < kept[expert]:
                    out[token] += self.weights[rank][token, choice] * fake_expert(self.x[rank][token], expert)
                seen[expert] += 1
        return out


def fake_expert(rows: Tensor, expert: int | Tensor) -> Tensor:
    return rows * (expert + 2) + expert


def apply_experts(plan: TokenPlan, rows: Tensor) -> Tensor:
    """Each real row through the expert that the plan says it belongs to."""
    expert = plan.residents[plan.tile_expert.long()].repeat_interleave(plan.size.tile)
    done = fake_expert(rows, expert[:, None])
    return torch.where((plan.order >= 0)[:, None], done, NAN)


def check_written_once(cluster: Cluster, buffers: list[Tensor]) -> None:
    """No two assignments share a place, every real row is written, and nothing else is."""
    places = [
        (host, row)
        for address in cluster.addresses
        for host, row in zip(address.host.flatten().tolist(), address.row.flatten().tolist(), strict=True)
        if host >= 0
    ]
    assert len(places) == len(set(places)) == int(cluster.case.kept.sum())
    for plan, rows in zip(cluster.plans, buffers, strict=True):
        assert torch.equal(~rows.isnan().any(dim=1), plan.order >= 0)
        assert torch.equal(~rows.isnan().all(dim=1), plan.order >= 0)


def check_padded(cluster: Cluster) -> None:
    """Through peers' memory by raw addresses."""
    num_ranks, size, device = len(cluster.plans), cluster.size, torch.device(cluster.device)

    def buffers(*shape: int) -> tuple[list[Tensor], Tensor]:
        tensors = [torch.full(shape, NAN, device=device) for _ in range(num_ranks)]
        return tensors, move.peer_addresses([t.data_ptr() for t in tensors], device)

    rows, row_peers = buffers(size.max_rows, cluster.width)
    scalars, scalar_peers = buffers(size.max_rows)
    for x, address, weights in zip(cluster.x, cluster.addresses, cluster.weights, strict=True):
        move.push_rows(x, address, row_peers, weights, scalar_peers)
    check_written_once(cluster, rows)
    check_written_once(cluster, [s[:, None] for s in scalars])

    plain = [torch.full_like(r, NAN) for r in rows]
    for x, address in zip(cluster.x, cluster.addresses, strict=True):
        move_reference.push_rows_reference(x, address, plain)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(rows, plain, strict=True))

    for plan, buffer in zip(cluster.plans, rows, strict=True):
        check_clear_padding(plan, buffer)
        buffer.copy_(apply_experts(plan, buffer))
    for rank, (address, weights) in enumerate(zip(cluster.addresses, cluster.weights, strict=True)):
        wide = torch.full((weights.shape[0], cluster.width + 5), 7.0, device=device)
        move.pull_rows(address, row_peers, weights, wide[:, 2:-3])
        torch.testing.assert_close(wide[:, 2:-3], cluster.want(rank))
        assert (wide[:, [0, 1, -3, -2, -1]] == 7).all()
        back = torch.full_like(weights, 7.0)
        move.pull_scalars(address, scalar_peers, back)
        assert torch.equal(back, torch.where(address.row >= 0, weights, 0))
    check_partial_sums(cluster)
    check_indirect(cluster, scalar_peers)


def check_indirect(cluster: Cluster, scalar_peers: Tensor) -> None:
    """Tensors of tokens found by addresses in device memory: the same bits."""
    device = torch.device(cluster.device)
    rows = [torch.full((cluster.size.max_rows, cluster.width), NAN, device=device) for _ in cluster.plans]
    direct = [torch.full_like(r, NAN) for r in rows]
    row_peers, direct_peers = (move.peer_addresses([t.data_ptr() for t in r], device) for r in (rows, direct))
    cells = torch.zeros(3, dtype=torch.int64, device=device)
    for x, address, weights in zip(cluster.x, cluster.addresses, cluster.weights, strict=True):
        fixed = torch.empty_like(weights)
        source, gates = pointed(cells, [x, weights])
        point(cells, [x, weights], [(weights, fixed)])
        assert torch.equal(fixed, weights)
        move.push_rows(source, address, row_peers, gates, scalar_peers)
        move.push_rows(x, address, direct_peers)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(rows, direct, strict=True))
    for x, address, weights in zip(cluster.x, cluster.addresses, cluster.weights, strict=True):
        got, back, want = torch.full_like(x, 7.0), torch.full_like(weights, 7.0), torch.full_like(x, 7.0)
        gates, out, out_scalars = pointed(cells, [weights, got, back])
        point(cells, [weights, got, back])
        move.pull_rows(address, row_peers, gates, out)
        move.pull_scalars(address, scalar_peers, out_scalars)
        move.pull_rows(address, row_peers, weights, want)
        assert torch.equal(got, want)
        assert torch.equal(back, torch.where(address.row >= 0, weights, 0))


def check_clear_padding(plan: TokenPlan, rows: Tensor) -> None:
    before, want = rows.clone(), rows.clone()
    move.clear_padding(rows, plan.starts, plan.ends)
    used = torch.arange(rows.shape[0], device=rows.device) < plan.num_rows
    want[used & (plan.order < 0)] = 0
    assert torch.equal(rows.nan_to_num(7), want.nan_to_num(7))
    move_reference.clear_padding_reference(before, plan.starts, plan.ends)
    assert torch.equal(before.nan_to_num(7), want.nan_to_num(7))


def check_partial_sums(cluster: Cluster) -> None:
    device = torch.device(cluster.device)
    parts = [torch.randn(3, cluster.size.max_rows, device=device) for _ in cluster.plans]
    peers = move.peer_addresses([p.data_ptr() for p in parts], device)
    for address in cluster.addresses:
        got = torch.empty(address.row.shape, device=device)
        move.pull_scalars(address, peers, got, 3, cluster.size.max_rows)
        assert torch.equal(got, move_reference.pull_scalars_reference(address, parts))


def check_packed(cluster: Cluster) -> None:
    """Through a send buffer, an exchange by splits, and an arrival buffer that the padded layout gathers."""
    plans, num_arrivals = cluster.plans, cluster.size.max_arrivals
    sent = []
    for x, address, plan in zip(cluster.x, cluster.addresses, plans, strict=True):
        packed = move.pack_rows(x, address, int(plan.send_rows.sum()))
        assert not packed.isnan().any()
        sent.append(packed.split(plan.send_rows.tolist()))
    returned = []
    for rank, plan in enumerate(plans):
        parts = [sent[source][rank] for source in range(len(plans))]
        assert [part.shape[0] for part in parts] == plan.recv_rows.tolist()
        arrived = torch.full((num_arrivals, cluster.width), NAN, device=cluster.device)
        arrived[: int(plan.recv_rows.sum())] = torch.cat(parts)
        done = apply_experts(plan, arrived[plan.order.long()])
        arrives = plan.inverse >= 0
        back = torch.where(arrives[:, None], done[plan.inverse.clamp_min(0).long()], NAN)
        assert torch.equal(~back.isnan().any(dim=1), arrives)
        returned.append(back[: int(plan.recv_rows.sum())].split(plan.recv_rows.tolist()))
    for rank, (address, weights) in enumerate(zip(cluster.addresses, cluster.weights, strict=True)):
        rows = torch.cat([returned[host][rank] for host in range(len(plans))])
        out = torch.empty_like(cluster.x[rank])
        move.unpack_rows(rows, address, weights, out)
        torch.testing.assert_close(out, cluster.want(rank))
        check_unpack_scalars(address, rows.shape[0])


def check_unpack_scalars(address: Address, num_rows: int) -> None:
    scalars = torch.randn(2, num_rows, device=address.row.device)
    got = move.unpack_scalars(scalars, address)
    want = scalars.sum(dim=0)[address.row.clamp_min(0).long()] if num_rows else torch.zeros_like(got)
    torch.testing.assert_close(got, torch.where(address.row >= 0, want, 0))
