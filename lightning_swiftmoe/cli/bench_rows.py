"""``swiftmoe bench rows``: dispatch and combine alone between this machine's GPUs, and the plan of a large cluster.

``dispatch`` writes every token to the padded, expert-ordered buffer of its expert's host and ends with a barrier of all
ranks; ``combine`` begins with one and adds the weighted results up where the tokens came from. Each is a CUDA graph of
its own, as in a training step.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_swiftmoe.cli._mistakes import one_line
from lightning_swiftmoe.kernels.dispatch import tile_rows
from lightning_swiftmoe.kernels.token_dispatch.address import Address, address_tokens
from lightning_swiftmoe.kernels.token_dispatch.move import clear_padding, pull_rows, push_rows
from lightning_swiftmoe.kernels.token_dispatch.plan import plan_tokens
from lightning_swiftmoe.kernels.token_dispatch.token_plan import PlanSize, TokenPlan
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.placement import Placement


@dataclass
class Options:
    """What can be overridden, as ``key=value``."""

    tokens: int = 4096  # of a rank
    width: int = 4096
    experts: int = 8  # a multiple of the GPUs; each is on one of them
    top_k: int = 1
    travel: list[float] = field(default_factory=lambda: [0.5, 1.0])  # shares of the tokens that leave their GPU
    repeats: int = 50  # medians of so many
    plan_ranks: int = 2048
    plan_experts: int = 256
    output: str | None = None  # a file for the numbers as JSON

    def check(self, num_gpus: int) -> None:
        """Before any process starts.

        Raises:
            ValueError: a size that means nothing, or does not fit the GPUs.
        """
        for name in ("tokens", "width", "experts", "top_k", "repeats", "plan_ranks", "plan_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if num_gpus < 2:
            raise ValueError(f"bench rows needs at least 2 GPUs in this machine, got {num_gpus}")
        if self.experts % num_gpus:
            raise ValueError(f"experts must be a multiple of the {num_gpus} GPUs, got {self.experts}")
        if self.top_k > self.experts // num_gpus:
            raise ValueError(
                f"top_k must be at most the {self.experts // num_gpus} experts of one GPU, got {self.top_k}: all "
                "choices of a token go to the same GPU, so that travel is what it says"
            )
        if any(not 0 <= share <= 1 for share in self.travel):
            raise ValueError(f"travel must be shares from 0 to 1, got {list(self.travel)}")


def main(argv: Sequence[str]) -> int:
    """Print the table; a user's mistake is one line and status 2."""
    if {"-h", "--help"} & set(argv):
        print("usage: swiftmoe bench rows [KEY=VALUE ...]")
        print("\n".join(f"  {key}={value}" for key, value in asdict(Options()).items()))
        return 0
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_cli(list(argv)))
        options: Options = OmegaConf.to_object(merged)  # type: ignore[assignment]
        num_gpus = torch.cuda.device_count()
        options.check(num_gpus)
    except (ValueError, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (num_gpus, folder, options), num_gpus, start_method="spawn")
        results = json.loads((Path(folder) / "results.json").read_text())
    _show(results, options, num_gpus)
    if options.output is not None:
        Path(options.output).write_text(json.dumps({"options": asdict(options), **results}, indent=1) + "\n")
    return 0


def routing(options: Options, num_ranks: int, share: float) -> list[Tensor]:
    """``[T, k]`` for each rank: the first ``share`` of its tokens to the next ranks' experts, the others to its own."""
    per_rank = options.experts // num_ranks
    rng = torch.Generator().manual_seed(0)
    all_ranks = []
    for rank in range(num_ranks):
        token = torch.arange(options.tokens)
        away = 1 + token % (num_ranks - 1)
        host = torch.where(token < round(share * options.tokens), (rank + away) % num_ranks, rank)
        choice = torch.rand(options.tokens, per_rank, generator=rng).argsort(dim=1)[:, : options.top_k]
        all_ranks.append(host[:, None] * per_rank + choice)
    return all_ranks


def _rank(rank: int, num_ranks: int, folder: str, options: Options) -> None:
    from lightning_swiftmoe.parallel.peer_memory import PeerMemory

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, device_id=device
    )
    assert dist.group.WORLD is not None
    memory = PeerMemory(dist.group.WORLD, device, Communicator(dist.group.WORLD, device))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": []}
    for share in options.travel:
        dispatch, combine = _row_times(memory, routing(options, num_ranks, share), options)
        results["rows"].append({"travel": share, "dispatch_us": dispatch, "combine_us": combine})
    results["plan_us"] = _plan_time(options, device)
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    memory.synchronize()  # who leaves while others wait in a barrier hangs them
    dist.destroy_process_group()


def _row_times(memory: Any, all_topk: list[Tensor], options: Options) -> tuple[float, float]:
    """Microseconds of dispatch and combine."""
    from lightning_swiftmoe.parallel.peer_memory import Channel

    tokens, plan, address = _planned(memory, all_topk, options)
    rows = memory.empty((plan.size.max_rows, options.width), torch.bfloat16)
    weights = torch.ones(address.row.shape, device=memory.device)
    back = torch.empty_like(tokens)
    memory.synchronize()

    def dispatch() -> None:
        clear_padding(rows.local, plan.starts, plan.ends)
        push_rows(tokens, address, rows.peers)
        memory.barrier(Channel.ROWS)

    def combine() -> None:
        memory.barrier(Channel.ROWS)
        pull_rows(address, rows.peers, weights, back)

    times = [_time_us(step, memory, options.repeats) for step in (dispatch, combine)]
    # Experts that do nothing give every token back, once for each of its choices.
    torch.testing.assert_close(back, tokens * options.top_k)
    return times[0], times[1]


def _planned(memory: Any, all_topk: list[Tensor], options: Options) -> tuple[Tensor, TokenPlan, Address]:
    """This rank's tokens, the plan, and where its assignments go."""
    per_rank = options.experts // memory.num_ranks
    placement = Placement.contiguous([1] * options.experts, per_rank)
    counts = torch.stack([torch.bincount(topk.flatten(), minlength=options.experts) for topk in all_topk])
    tile = tile_rows(memory.device)
    most = sum(topk.numel() for topk in all_topk) + (per_rank + 1) * tile
    plan = _plan(
        counts.numpy(), placement, memory.rank, PlanSize(per_rank, -(-most // tile) * tile, tile), memory.device
    )()
    tokens = torch.randn(options.tokens, options.width, device=memory.device).bfloat16()
    return tokens, plan, address_tokens(all_topk[memory.rank].to(memory.device), plan)


def _plan(
    counts: np.ndarray, placement: Placement, rank: int, size: PlanSize, device: torch.device
) -> Callable[[], TokenPlan]:
    """Makes the plan from what is on the device already."""
    all_counts = torch.from_numpy(counts).to(device)
    multiplicity = torch.tensor(placement.multiplicity, dtype=torch.int32, device=device)
    replicas = torch.tensor(placement.replicas, dtype=torch.int32, device=device)
    return lambda: plan_tokens(all_counts, multiplicity, replicas, rank, size)


def _plan_time(options: Options, device: torch.device) -> float:
    """Microseconds of the plan of one rank among many, each expert twice on average, loads skewed."""
    from triton.testing import do_bench_cudagraph

    rng = np.random.default_rng(0)
    slots = -(-2 * options.plan_experts // options.plan_ranks)
    table = rng.permutation(np.arange(options.plan_ranks * slots) % options.plan_experts)
    placement = Placement(table.reshape(options.plan_ranks, slots), options.plan_experts)
    load = 8192 * rng.dirichlet(np.full(options.plan_experts, 0.3))
    counts = rng.poisson(load, size=(options.plan_ranks, options.plan_experts))
    size = PlanSize(slots, 2**20, tile_rows(device))
    return 1e3 * do_bench_cudagraph(_plan(counts, placement, 0, size, device))


def _time_us(step: Callable[[], None], memory: Any, repeats: int) -> float:
    """Median microseconds of ``step`` as a CUDA graph; all ranks start together."""
    step()
    memory.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 6)]
    memory.synchronize()
    for mark in marks:
        mark.record()
        graph.replay()
    memory.synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks[5:])]
    return statistics.median(times)


def _show(results: dict[str, Any], options: Options, num_gpus: int) -> None:
    megabytes = options.tokens * options.top_k * options.width * 2 / 1e6
    print(
        f"{num_gpus} x {results['device']}, torch {results['torch']}; {options.tokens:,} tokens a GPU of width "
        f"{options.width}, bf16, {options.experts} experts, top-{options.top_k}: {megabytes:.1f} MB a GPU"
    )
    table = Table("travelling", "dispatch us", "combine us", box=None, pad_edge=False)
    for row in results["rows"]:
        table.add_row(f"{row['travel']:.0%}", f"{row['dispatch_us']:.1f}", f"{row['combine_us']:.1f}")
    Console().print(table)
    print(f"plan for {options.plan_ranks:,} ranks x {options.plan_experts} experts: {results['plan_us']:.1f} us")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
