"""Which ranks share a set of experts, and the process groups they talk through."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@dataclass(frozen=True, eq=False)
class ExpertMesh:
    """Where a canonical expert tensor is cut, and along which of its dims.

    Args:
        device_mesh: ranks that share one set of experts; with several expert groups all ranks, by group first.
        placements: one for each of its dims.
    """

    device_mesh: DeviceMesh
    placements: tuple[Placement, ...] = (Shard(1),)


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's process groups for one purpose.

    Args:
        experts: the ranks that share one set of experts: this rank's expert group.
        replicas: the ranks that hold the same shards, one of each expert group; None where there is one group.
    """

    experts: ProcessGroup
    replicas: ProcessGroup | None = None

    @classmethod
    def of(cls, group_size: int, timeout: timedelta | None, backend: str | None = None) -> Groups:
        """Ranks ``0 .. group_size - 1`` are the first expert group, and so on: consecutive ranks share a node.

        Collective; every rank takes part in making every group.

        Args:
            group_size: divides the ranks of the job.
            timeout: of a collective.
            backend: None for the job's.
        """
        num_ranks = dist.get_world_size()
        if group_size == num_ranks:
            return cls(dist.new_group(timeout=timeout, backend=backend))
        ranks = torch.arange(num_ranks).view(-1, group_size)
        experts, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout, backend)
        replicas, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout, backend)
        return cls(experts, replicas)

    @property
    def all(self) -> tuple[ProcessGroup, ...]:
        """To destroy."""
        return (self.experts,) if self.replicas is None else (self.experts, self.replicas)

    def expert_mesh(self, kind: str) -> ExpertMesh:
        """The mesh of these groups, for tensors on devices of ``kind``."""
        experts, replicas = self.experts, self.replicas
        # torch takes meshes of equal names for the same one and would go on using the groups of an earlier fit.
        if replicas is None:
            name = f"experts_{experts.group_name}"
            return ExpertMesh(DeviceMesh.from_group(experts, kind, mesh_dim_names=(name,)))
        names = (f"replicate_{replicas.group_name}", f"expert_{experts.group_name}")
        ranks = torch.arange(dist.get_world_size()).view(replicas.size(), experts.size())
        mesh = DeviceMesh.from_group([replicas, experts], kind, ranks, mesh_dim_names=names)
        return ExpertMesh(mesh, (Replicate(), Shard(1)))


_DENSE = "dense_"
_numbers = itertools.count()


def dense_mesh_name() -> str:
    """Of the mesh of one fit's dense shards; see ``Groups.expert_mesh`` for why each has another."""
    return f"{_DENSE}{next(_numbers)}"


def is_dense_mesh(mesh: DeviceMesh) -> bool:
    """Whether tensors on it are dense Parameters that FSDP2 has cut, or made of them."""
    names = mesh.mesh_dim_names or ("",)
    return names[0].startswith(_DENSE)


def forget_meshes() -> None:
    """Let torch forget how it treated tensors on the meshes of a fit: what it remembers keeps their groups open."""
    _clear_sharding_prop_cache()
