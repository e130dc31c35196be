"""Which ranks share a set of experts, and the process groups they talk through."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard


@dataclass(frozen=True, eq=False)
class ExpertMesh:
    """Where a canonical expert tensor is cut, and along which of its dims.

    Args:
        device_mesh: ranks that share one set of experts.
        placements: one for each of its dims.
    """

    device_mesh: DeviceMesh
    placements: tuple[Placement, ...] = (Shard(1),)
