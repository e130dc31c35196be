"""``swiftmoe bench network``: modelled steps beside measured ones, on ranks whose links have a chosen rate.

Every rank trains in a network namespace of its own; the namespaces are joined by a bridge, each link limited in both
directions. The trace of the very run is replayed by the simulator, with the rate as the cluster's NIC.

What the model is told beforehand, none of it from the steps it predicts: the rates of an exchange in which one rank
sends, of one in which all do, and of an all-reduce (timed before the first step), and what a step spends outside the
exchanges when links are not limited.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.cli._mistakes import one_line
from lightning_swiftmoe.cli._namespaces import address, run_on_links, sent_bytes, why_not
from lightning_swiftmoe.cli._scenario import shape_of
from lightning_swiftmoe.data import StdlibSource, TextData
from lightning_swiftmoe.models import GPTConfig, GPTModule
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.placement import get_policy
from lightning_swiftmoe.simulate import (
    Coefficient,
    Efficiency,
    ExactSplit,
    Hardware,
    ModelShape,
    PolicyResult,
    Scenario,
    System,
    load_trace,
    simulate,
)
from lightning_swiftmoe.step import Step
from lightning_swiftmoe.strategy import SwiftMoEStrategy

# What can be told apart in both worlds. ``tokens``: dispatch and combine, forward and backward. ``rest``: computing,
# and the all-reduce of the dense gradients, which DDP hides in the backward pass.
PHASES = ("load", "tokens", "gradient", "weight", "rest")
_DEVICE = "eth0"


@dataclass
class Setting:
    """What to train, and on what. Chosen so that the network takes most of a step at these rates.

    Args:
        rates_mbit: limits of a link, 10^6 bit/s in each direction.
        policies: placement policies.
        expert_parallel_size: ranks that share one set of experts; None: all.
        num_ranks, slots_per_rank, num_experts, num_layers, hidden_size, ffn_size: sizes.
        seq_len, batch_size: tokens of a sequence; sequences of one step over all ranks.
        warmup, steps: steps left out, and steps measured.
        receives_first: exchange with all receives posted before the sends; False: as ``Communicator`` does, with gloo's
            ``all_to_all_single``, in which the two directions between a pair of ranks mostly take turns.
        output: JSON file for all numbers.
    """

    rates_mbit: list[float] = field(default_factory=lambda: [25.0, 50.0, 100.0])
    policies: list[str] = field(default_factory=lambda: ["static", "proportional"])
    expert_parallel_size: int | None = None
    num_ranks: int = 4
    slots_per_rank: int = 4
    num_experts: int = 8
    num_layers: int = 2
    hidden_size: int = 128
    ffn_size: int = 512
    seq_len: int = 256
    batch_size: int = 8
    warmup: int = 2
    steps: int = 10
    receives_first: bool = False
    output: str | None = None

    @property
    def model(self) -> GPTConfig:
        """Every block an MoE with a capacity."""
        return GPTConfig(
            max_seq_len=self.seq_len,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=4,
            ffn_size=self.ffn_size,
            num_experts=self.num_experts,
            capacity_factor=1.0,
        )


@dataclass(frozen=True)
class Link:
    """What one rank gets of its link, timed before the first step.

    Args:
        one_way_Bps: bytes sent per second where one rank sends to all others, and nobody else sends.
        exchange_Bps: bytes sent per second where all do.
        all_reduce_Bps: bytes sent per second in a ring all-reduce.
    """

    one_way_Bps: float
    exchange_Bps: float
    all_reduce_Bps: float

    @property
    def duplex(self) -> float:
        """Part of one direction that moves during the other: ``2 - duplex`` times one direction's time is both's."""
        return min(1.0, max(0.01, 2 - self.one_way_Bps / self.exchange_Bps))


@dataclass(frozen=True)
class Measured:
    """A run, medians over its steps of the mean over ranks.

    Args:
        step_s: one step.
        phase_s: its parts, by ``PHASES``.
        link: of the slowest rank.
        counted_bytes: sent in the exchanges of the measured steps, all ranks.
        wire_bytes: what left all devices meanwhile, headers and the dense all-reduce included.
        trace: file of the loads.
    """

    step_s: float
    phase_s: dict[str, float]
    link: Link
    counted_bytes: int
    wire_bytes: int
    trace: Path


@dataclass(frozen=True)
class Comparison:
    """One row: a policy at a rate, measured and modelled; bytes as in ``Measured``, without headers."""

    policy: str
    rate_mbit: float
    measured: Measured
    modelled_s: dict[str, float]
    modelled_bytes: float
    modelled_wire_bytes: float

    @property
    def modelled_step_s(self) -> float:
        """Sum of the phases."""
        return sum(self.modelled_s.values())

    @property
    def error(self) -> float:
        """Modelled over measured step time, less one."""
        return self.modelled_step_s / self.measured.step_s - 1


class _Watch(ExpertRebalancer):
    """Times steps and keeps what their exchanges moved."""

    def __init__(self, policy: str, trace: Path | None, warmup: int) -> None:
        super().__init__(policy, trace=trace)
        self._warmup = warmup
        self.link: Link | None = None
        self.step_s: list[float] = []
        self.phase_s: list[dict[str, float]] = []
        self.counted_bytes = 0
        self.wire_bytes = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(trainer.strategy, SwiftMoEStrategy)
        assert trainer.strategy.parallelism is not None
        assert self.engine is not None
        self.link = time_link(trainer.strategy.parallelism.everybody)
        self.engine.observers.append(self._keep)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._warmup:
            dist.barrier()
            self.wire_bytes -= sent_bytes(_DEVICE)
        self._start = time.perf_counter()

    def _keep(self, step: Step) -> None:
        moved = step.traffic
        self.phase_s.append(
            {
                "load": moved["load"].seconds,
                "tokens": moved["dispatch"].seconds + moved["combine"].seconds,
                "gradient": moved["gradient"].seconds,
                "weight": moved["weight"].seconds,
            }
        )
        if len(self.phase_s) > self._warmup:
            self.counted_bytes += sum(traffic.sent_bytes for traffic in moved.values())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.step_s.append(time.perf_counter() - self._start)
        self.phase_s[-1]["rest"] = self.step_s[-1] - sum(self.phase_s[-1].values())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        dist.barrier()  # what is still queued has left by now
        self.wire_bytes += sent_bytes(_DEVICE)


def receives_first(
    output: Tensor, rows: Tensor, recv: list[int], send: list[int], group: dist.ProcessGroup | None = None
) -> None:
    """``all_to_all_single`` in which no request for data waits behind data that goes the other way.

    gloo's own posts a send, then a receive, for one partner after the other. Who comes second asks for its data on the
    connection that it fills with its own, so that one direction waits for the other (docs/results/network.md).
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    arriving, leaving = output.split(recv), rows.split(send)
    arriving[rank].copy_(leaving[rank])
    partners = [(rank + i) % num_ranks for i in range(1, num_ranks)]
    works = [dist.irecv(arriving[j], group_src=j, group=group) for j in reversed(partners) if recv[j]]
    works += [dist.isend(leaving[j], group_dst=j, group=group) for j in partners if send[j]]
    for work in works:
        assert work is not None  # None only for ranks outside the group
        work.wait()


def time_link(communicator: Communicator, partner_bytes: int = 256 * 1024, repeats: int = 12) -> Link:
    """Exchanges and all-reduces back to back, as layers follow each other in a step; so many bytes for each partner.

    Every rank calls it, and all get the slowest rank's times, which are what the model asks for.
    """
    rank, num_ranks = communicator.rank, communicator.num_ranks
    row = torch.zeros(1, partner_bytes // 4)

    def all_to_all(send: list[int], recv: list[int]) -> None:
        communicator.all_to_all(row.expand(sum(send), -1), send, recv, "setup", "calibration")

    def seconds(work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        dist.barrier()
        slowest = torch.tensor((time.perf_counter() - start) / repeats)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    ones, zeros = [1] * num_ranks, [0] * num_ranks
    one_way_s = seconds(lambda: all_to_all(ones if rank == 0 else zeros, [1, *zeros[1:]]))
    exchange_s = seconds(lambda: all_to_all(ones, ones))
    all_reduce_s = seconds(lambda: dist.all_reduce(row.repeat(num_ranks, 1)))
    communicator.meter.pop()
    sent_bytes = (num_ranks - 1) * partner_bytes
    return Link(sent_bytes / one_way_s, sent_bytes / exchange_s, 2 * sent_bytes / all_reduce_s)


def _train(rank: int, setting: Setting, policy: str, data: TextData, trace: Path) -> dict[str, Any]:
    """One rank, in its own namespace: the port is nobody else's."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": address(0), "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": _DEVICE}
    os.environ |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0"}
    watch = _Watch(policy, trace, setting.warmup)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=setting.num_ranks,
        strategy=SwiftMoEStrategy(
            setting.slots_per_rank,
            expert_parallel_size=setting.expert_parallel_size,
            process_group_backend="gloo",
            timeout=60,
        ),
        callbacks=[watch],
        max_steps=setting.warmup + setting.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    patch = mock.patch.object(dist, "all_to_all_single", receives_first) if setting.receives_first else nullcontext()
    with patch:
        trainer.fit(GPTModule(setting.model), data)
    names = ("step_s", "phase_s", "link", "counted_bytes", "wire_bytes")
    return {name: getattr(watch, name) for name in names}


def measure(setting: Setting, policy: str, rate_mbit: float | None, data: TextData, folder: Path) -> Measured:
    """Train on links of this rate; None: not limited."""
    trace = folder / f"{policy}-{rate_mbit}.npy.gz"
    ranks = run_on_links(setting.num_ranks, rate_mbit, _train, setting, policy, data, trace)
    used = slice(setting.warmup, None)
    steps = np.array([rank["step_s"] for rank in ranks])[:, used].mean(axis=0)
    phases = {
        phase: np.array([[step[phase] for step in rank["phase_s"]] for rank in ranks])[:, used].mean(axis=0)
        for phase in PHASES
    }
    return Measured(
        step_s=float(np.median(steps)),
        phase_s={phase: float(np.median(values)) for phase, values in phases.items()},
        link=ranks[0]["link"],
        counted_bytes=sum(rank["counted_bytes"] for rank in ranks),
        wire_bytes=sum(rank["wire_bytes"] for rank in ranks),
        trace=trace,
    )


def hardware_of(setting: Setting, rate_mbit: float, link: Link, rest_s: float) -> tuple[Hardware, Efficiency]:
    """The namespaces as a cluster: one rank per node.

    Args:
        setting: sizes.
        rate_mbit: limit of a link.
        link: what an exchange gets of it.
        rest_s: of a step without a limit. All of it is put down to FLOPs; memory is out of the way.
    """
    model = model_of(setting)
    tokens = setting.batch_size * setting.seq_len / setting.num_ranks
    flops = 3 * tokens * (model.dense_flops_per_token + model.num_moe_layers * model.expert_flops_per_token)
    out_of_the_way = 1e6
    hardware = Hardware(
        device_name="a forked rank in a network namespace",
        peak_tflops_bf16=flops / rest_s / 1e12,
        hbm_GBps=out_of_the_way,
        hbm_gb=1.0,
        pcie_GBps=out_of_the_way,
        nic_Gbps=rate_mbit / 1e3,
        nic_latency_us=0.0,  # below a millisecond, and in the rate of the exchange timed
        gpus_per_node=1,
        num_nodes=setting.num_ranks,
        sources="calibrated: steps with links that are not limited, and exchanges before the first step",
    )
    line_Bps = rate_mbit * 1e6 / 8
    efficiency = dataclasses.replace(
        Efficiency.ideal(),
        compute=Coefficient(1.0, "the rate above is measured"),
        network=Coefficient(link.one_way_Bps / line_Bps, "measured: an exchange in which one rank sends"),
        duplex=Coefficient(link.duplex, "measured: against an exchange in which all do"),
        all_reduce=Coefficient(link.all_reduce_Bps / line_Bps, "measured: a ring all-reduce"),
    )
    return hardware, efficiency


def model_of(setting: Setting) -> ModelShape:
    """In fp32, on the wire too."""
    return dataclasses.replace(shape_of(setting.model.sizes()), weight_bytes=4, grad_bytes=4)


def compare(setting: Setting, policy: str, rate_mbit: float, measured: Measured, rest_s: float) -> Comparison:
    """Replay the run's trace and set the modelled step beside the measured one."""
    hardware, efficiency = hardware_of(setting, rate_mbit, measured.link, rest_s)
    scenario = Scenario(
        model_of(setting),
        hardware,
        setting.slots_per_rank,
        efficiency=efficiency,
        expert_parallel_size=setting.expert_parallel_size,
    )
    system = System(policy, get_policy(policy), split=ExactSplit())
    result = simulate(load_trace(measured.trace), scenario, [system]).results[policy]
    used = slice(setting.warmup, None)
    modelled_s = {phase: float(np.median(values[used])) for phase, values in modelled_phases(result).items()}
    sent = {phase: float(values[used].sum()) for phase, values in result.phase_bytes.items()}
    return Comparison(
        policy=policy,
        rate_mbit=rate_mbit,
        measured=measured,
        modelled_s=modelled_s,
        modelled_bytes=sum(sent.values()) - sent["dense"],
        modelled_wire_bytes=sum(sent.values()),
    )


def modelled_phases(result: PolicyResult) -> dict[str, np.ndarray]:
    """``[T]`` seconds by ``PHASES``: the backward pass exchanges as much again as dispatch and combine."""
    seconds = result.phase_s
    parts = {
        "load": seconds["load"],
        "tokens": 2 * (seconds["dispatch"] + seconds["combine"]),
        "gradient": seconds["gradient"],
        "weight": seconds["weight"],
    }
    return parts | {"rest": result.step_s - np.sum(list(parts.values()), axis=0)}


def bench(setting: Setting) -> list[Comparison]:
    """All policies at all rates.

    Raises:
        ValueError: no network namespaces here; says why.
    """
    reason = why_not()
    if reason is not None:
        raise ValueError(reason)
    torch.set_num_threads(1)  # ranks are forked, and a forked pool of threads hangs
    data = TextData(StdlibSource(), setting.seq_len, setting.batch_size, limit_bytes=1_000_000)
    data.tokens("train")  # read once, before the ranks are forked
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for policy in setting.policies:
            rest_s = measure(setting, policy, None, data, folder).phase_s["rest"]
            for rate in setting.rates_mbit:
                measured = measure(setting, policy, rate, data, folder)
                rows.append(compare(setting, policy, rate, measured, rest_s))
    return rows


def main(argv: Sequence[str]) -> int:
    """Fields of ``Setting`` as ``key=value``; a user's mistake is one line and status 2."""
    if {"-h", "--help"} & set(argv):
        print("usage: swiftmoe bench network [KEY=VALUE ...]   (Linux, as root)")
        print(OmegaConf.to_yaml(OmegaConf.structured(Setting)), end="")
        return 0
    try:
        setting = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Setting), OmegaConf.from_dotlist(list(argv)))
        )
        assert isinstance(setting, Setting)
        rows = bench(setting)
    except (ValueError, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if setting.output:
        content = [dataclasses.asdict(row) for row in rows]
        for row in content:
            del row["measured"]["trace"]  # gone with its folder
        Path(setting.output).write_text(json.dumps(content, indent=1) + "\n")
    console = Console(width=120, highlight=False)
    console.print(step_table(rows))
    console.print(link_table(rows))
    return 0


def step_table(rows: Sequence[Comparison]) -> Table:
    """Measured / modelled milliseconds by phase."""
    table = Table(title="ms per step: measured / modelled", box=None)
    for column in ("policy", "Mbit/s", *PHASES, "step", "modelled is"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        pairs = [(row.measured.phase_s[phase], row.modelled_s[phase]) for phase in PHASES]
        pairs.append((row.measured.step_s, row.modelled_step_s))
        cells = [f"{1e3 * a:.0f} / {1e3 * b:.0f}" for a, b in pairs]
        table.add_row(row.policy, f"{row.rate_mbit:g}", *cells, f"{row.error:+.1%}")
    return table


def link_table(rows: Sequence[Comparison]) -> Table:
    """What exchanges get of the link, and bytes."""
    table = Table(title="share of the link's rate; MB of all measured steps: counted / modelled", box=None)
    for column in ("policy", "Mbit/s", "one rank sends", "all send", "all-reduce", "in exchanges", "on the wire"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        link, line_Bps = row.measured.link, row.rate_mbit * 1e6 / 8
        shares = [f"{Bps / line_Bps:.0%}" for Bps in (link.one_way_Bps, link.exchange_Bps, link.all_reduce_Bps)]
        pairs = [
            (row.measured.counted_bytes, row.modelled_bytes),
            (row.measured.wire_bytes, row.modelled_wire_bytes),
        ]
        table.add_row(row.policy, f"{row.rate_mbit:g}", *shares, *(f"{a / 1e6:.2f} / {b / 1e6:.2f}" for a, b in pairs))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
