"""What a cluster's machines can do, and how much of it a program gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_swiftmoe.arguments import check_count, is_integer, is_number


@dataclass(frozen=True)
class Coefficient:
    """A number of the cost model and where it comes from."""

    value: float
    source: str

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(f"every coefficient names its source; {self.value!r} has none")


@dataclass(frozen=True)
class Hardware:
    """One kind of node, as its data sheet says. Units are in the names; GB is 10^9 bytes, Gb is 10^9 bits.

    Args:
        device_name: what it is.
        peak_tflops_bf16: dense bf16 multiply-adds of one device, 10^12 FLOP/s.
        hbm_GBps: device memory bandwidth.
        hbm_gb: device memory.
        pcie_GBps: host to device, one direction, of one device.
        nvlink_GBps: device to device inside a node, one direction; 0 where there is none.
        nic_Gbps: network of one device, one direction.
        nic_latency_us: one message.
        gpus_per_node: devices of one node.
        num_nodes: nodes of the cluster.
        sources: where the numbers come from, by field or as free text.

    Raises:
        ValueError: a value that is no number, not positive, or not finite.
    """

    device_name: str
    peak_tflops_bf16: float
    hbm_GBps: float
    hbm_gb: float
    pcie_GBps: float
    nic_Gbps: float
    nic_latency_us: float
    gpus_per_node: int
    num_nodes: int
    nvlink_GBps: float = 0.0
    sources: Any = field(default=(), hash=False)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if spec.name not in ("device_name", "sources"):
                self._check(spec.name, getattr(self, spec.name))
        if self.gpus_per_node > 1 and self.nvlink_GBps == 0:
            object.__setattr__(self, "nvlink_GBps", self.pcie_GBps)

    def _check(self, name: str, value: Any) -> None:
        if name in ("gpus_per_node", "num_nodes"):
            fits, kind = is_integer(value) and value > 0, "a positive integer"
        elif name in ("nvlink_GBps", "nic_latency_us"):
            fits, kind = is_number(value) and value >= 0, "a number, zero or more"
        else:
            fits, kind = is_number(value) and value > 0, "a positive number"
        if not fits:
            raise ValueError(f"hardware.{name} must be {kind}, got {value!r}; correct it in the cluster file")

    @property
    def num_ranks(self) -> int:
        """One rank per device."""
        return self.gpus_per_node * self.num_nodes

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Hardware:
        """Read the ``hardware:`` part of a cluster file.

        Raises:
            ValueError: a field is missing, unknown or impossible; the message names it.
        """
        known = {spec.name: spec for spec in dataclasses.fields(cls)}
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and f.name not in values]
        missing = [n for n in missing if n != "sources"]
        if missing:
            raise ValueError(f"the cluster's hardware lacks {', '.join(missing)}; add it to its 'hardware:' section")
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown hardware fields {', '.join(unknown)}; there are {', '.join(known)}")
        return cls(**dict(values))

    def with_ranks(self, num_ranks: int) -> Hardware:
        """The same machines, as many as ``num_ranks`` need.

        Raises:
            ValueError: no positive integer; or more than one node, but not whole nodes.
        """
        check_count("num_ranks", num_ranks)
        if num_ranks <= self.gpus_per_node:
            return dataclasses.replace(self, gpus_per_node=num_ranks, num_nodes=1)
        if num_ranks % self.gpus_per_node:
            raise ValueError(f"{num_ranks} ranks do not fill nodes of {self.gpus_per_node} devices; use a multiple")
        return dataclasses.replace(self, num_nodes=num_ranks // self.gpus_per_node)


_COMPUTE = Coefficient(0.4, "assumption: 40 % of peak, the lower end of published dense GPT training on A100 and H100")
_NETWORK = Coefficient(0.8, "assumption: large messages reach about 80 % of the line rate after protocol overhead")
_DUPLEX = Coefficient(1.0, "assumption: exchanges send and receive at once, as NCCL's do; gloo's do so in part")
_PCIE = Coefficient(0.8, "assumption: pinned host copies reach about 80 % of the link")
_MEMORY = Coefficient(0.8, "assumption: streaming kernels reach about 80 % of the memory bandwidth")
_HOST_ADAM = Coefficient(4e9, "assumption: vectorised Adam in host memory, 30 B a parameter at 120 GB/s")
_POLICY_FIXED = Coefficient(4e-5, "measured: docs/results/simulator.md, 16 ranks x 4 slots")
_POLICY_SLOT = Coefficient(2.5e-8, "measured: docs/results/simulator.md, 2,048 ranks x 2 slots")


@dataclass(frozen=True)
class Efficiency:
    """Which part of the data sheet a training program sees. Measure your own and pass them for absolute times."""

    compute: Coefficient = _COMPUTE
    network: Coefficient = _NETWORK  # exchanges, in which every rank has something for every other
    duplex: Coefficient = _DUPLEX  # part of an exchange's smaller direction that moves during the larger one, 0 to 1
    all_reduce: Coefficient = _NETWORK  # dense gradients; a ring has one partner in each direction
    pcie: Coefficient = _PCIE
    memory: Coefficient = _MEMORY
    host_adam_params_per_s: Coefficient = _HOST_ADAM
    policy_fixed_s: Coefficient = _POLICY_FIXED
    policy_slot_s: Coefficient = _POLICY_SLOT

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            coefficient = getattr(self, spec.name)
            if not isinstance(coefficient, Coefficient) or not coefficient.value > 0:
                raise ValueError(f"efficiency.{spec.name} must be a Coefficient above zero, got {coefficient!r}")
        if self.duplex.value > 1:
            raise ValueError(f"efficiency.duplex is 1 at most, both directions at once; got {self.duplex.value!r}")

    @classmethod
    def ideal(cls) -> Efficiency:
        """Everything at its data-sheet rate: for comparisons with published formulas, which assume it."""
        one = Coefficient(1.0, "data sheet")
        return cls(compute=one, network=one, all_reduce=one, pcie=one, memory=one)

    @classmethod
    def from_mapping(cls, values: Mapping[str, float], source: str = "given by the user") -> Efficiency:
        """Defaults with some values replaced.

        Raises:
            ValueError: an unknown name.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown efficiency {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return dataclasses.replace(cls(), **{name: Coefficient(value, source) for name, value in values.items()})
