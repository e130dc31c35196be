"""Sets up a user's module for several ranks: process groups, experts, layers and their dispatchers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_swiftmoe.cluster import ClusterShape
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher
from lightning_swiftmoe.layers.moe import MoE, moe_layers
from lightning_swiftmoe.parallel.bound_experts import BoundExperts
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.decoupled_experts import DecoupledExperts
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts
from lightning_swiftmoe.parallel.mesh import ExpertMesh
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from lightning_swiftmoe.parallel.row_exchange import RowExchange, TokenBound
from lightning_swiftmoe.parallel.shard_exchange import ShardExchangeFactory
from lightning_swiftmoe.parallel.token_dispatcher import DeviceDispatcher, HostDispatcher
from lightning_swiftmoe.parallel.traffic import TrafficMeter
from lightning_swiftmoe.parallel.transports import choose_transport
from lightning_swiftmoe.parallel.watchdog import Watchdog
from lightning_swiftmoe.placement import CapacityScope, Placement

_HOSTED: dict[str, type[HostedExperts]] = {"decoupled": DecoupledExperts, "bound": BoundExperts}
_COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Parallelism:
    """The ranks and what they talk through. Every group is our own: DDP's buckets and our exchanges never wait for each
    other's order, and ``close`` destroys what was made.

    Args:
        num_ranks: ranks.
        device: where this rank computes.
        tokens: communicator for tokens.
        state: communicator for expert weights and gradients.
        control: communicator for small facts on the host; None with one rank.
        meter: counts what the first two send.
        groups: to destroy.
        transport: how rows and expert state travel: ``"gloo"``, ``"nccl"`` or ``"symmetric"``.
        rows: carries rows planned on the device; None with ``"gloo"`` and with one rank.
        bound: of the assignments of a rank; None with one rank.
        watchdog: of exchanges on GPUs; None where the host waits for them, and so hears of a timeout itself.
        make_exchange: of expert state through memory that all ranks reach; None: it travels by all-to-all.
    """

    num_ranks: int
    device: torch.device
    tokens: Communicator
    state: Communicator
    control: Communicator | None
    meter: TrafficMeter
    groups: tuple[dist.ProcessGroup, ...]
    transport: str = "gloo"
    rows: RowExchange | None = None
    bound: TokenBound | None = None
    watchdog: Watchdog | None = None
    make_exchange: ShardExchangeFactory | None = None

    @classmethod
    def on(cls, device: torch.device, timeout: timedelta | None, transport: str = "auto") -> Parallelism:
        """All ranks of the job. Collective.

        Raises:
            ValueError: a transport that these ranks do not have.
        """
        meter = TrafficMeter()
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks == 1:
            alone = Communicator(None, device, meter)
            return cls(1, device, alone, alone, None, meter, ())
        tokens = dist.new_group(timeout=timeout)
        state = dist.new_group(timeout=timeout)
        control = dist.new_group(timeout=timeout, backend="gloo")
        on_host = Communicator(control)
        chosen = choose_transport(transport, device, on_host)
        bound = TokenBound(on_host)
        watchdog = _watchdog(device, timeout, on_host)
        of_tokens = Communicator(tokens, device, meter, watchdog)
        rows, make_exchange = _device_exchanges(chosen, of_tokens, on_host, bound)
        return cls(
            num_ranks,
            device,
            of_tokens,
            Communicator(state, device, meter, watchdog),
            on_host,
            meter,
            (tokens, state, control),
            chosen,
            rows,
            bound,
            watchdog,
            make_exchange,
        )

    def expert_mesh(self, *, on_host: bool) -> ExpertMesh | None:
        """For what users see of sharded experts, on the host where they are offloaded; None with one rank."""
        if self.num_ranks == 1:
            return None
        _, state, control = self.groups
        group, kind = (control, "cpu") if on_host else (state, self.device.type)
        # torch takes meshes of equal names for the same one and would go on using the groups of an earlier fit.
        return ExpertMesh(DeviceMesh.from_group(group, kind, mesh_dim_names=(f"experts_{group.group_name}",)))

    def close(self) -> None:
        """Destroy our process groups. Collective."""
        if self.watchdog is not None:
            self.watchdog.close()
        for group in self.groups:
            dist.destroy_process_group(group)


class FirstPlacements(Protocol):
    """Says where experts start."""

    def first_placement(self, layer: str, cluster: ClusterShape) -> Placement:
        """The placement of ``layer`` to start with."""
        ...


def build_layers(
    module: nn.Module,
    parallelism: Parallelism,
    cluster_of: Callable[[str, MoE], ClusterShape],
    first: FirstPlacements,
    *,
    compute_dtype: str,
    accumulates: bool,
    offload: bool,
    capacity_scope: CapacityScope,
    state_place: str,
    masters: Mapping[str, Tensor],
) -> list[ExpertLayer]:
    """Shard the experts of ``module`` and attach its ``MoE`` layers; their Parameters are installed by the caller.

    Collective: every rank takes rank 0's weights.

    Args:
        module: the user's.
        parallelism: the ranks.
        cluster_of: shape for a layer by name.
        first: where experts start.
        compute_dtype: Lightning's precision.
        accumulates, offload: as for ``HostedExperts``.
        capacity_scope: whose assignments an expert's capacity counts.
        state_place: ``"decoupled"`` or ``"bound"``.
        masters: canonical weights of a checkpoint by name in ``module``.
    """
    layers = []
    mesh = parallelism.expert_mesh(on_host=offload)
    for moes in _by_experts(module):
        name, moe = next(iter(moes.items()))
        prefix = f"{name}.experts" if name else "experts"
        cluster = cluster_of(name, moe)
        for param in moe.experts.parameters():
            parallelism.state.broadcast(param.data, "setup", name)
        hosted = _HOSTED[state_place](
            moe.experts,
            prefix,
            parallelism.state,
            mesh,
            first.first_placement(name, cluster),
            num_sharers=parallelism.num_ranks,
            compute_dtype=_COMPUTE_DTYPES.get(compute_dtype),
            accumulates=accumulates,
            offload=offload,
            make_exchange=parallelism.make_exchange,
            masters={
                key: masters[n] for key, _ in moe.experts.named_parameters() if (n := f"{prefix}.{key}") in masters
            },
        )
        layer = ExpertLayer(name, moes, cluster, hosted)
        _attach(layer, parallelism, capacity_scope)
        layers.append(layer)
    return layers


def _device_exchanges(
    transport: str, tokens: Communicator, control: Communicator, bound: TokenBound
) -> tuple[RowExchange | None, ShardExchangeFactory | None]:
    """What is planned or done on the device: of rows and of expert state."""
    if transport == "nccl":
        return NcclRows(tokens, bound), None
    if transport == "symmetric":
        from lightning_swiftmoe.parallel.peer_memory import PeerMemory
        from lightning_swiftmoe.parallel.symmetric_rows import SymmetricRows
        from lightning_swiftmoe.parallel.symmetric_shards import SymmetricState

        assert tokens.group is not None
        memory = PeerMemory(tokens.group, tokens.device, control)
        return SymmetricRows(tokens, memory, bound), SymmetricState(memory)
    return None, None


def _watchdog(device: torch.device, timeout: timedelta | None, control: Communicator) -> Watchdog | None:
    if device.type != "cuda" or timeout is None:
        return None
    watchdog = Watchdog(timeout.total_seconds(), control.rank, control.num_ranks)
    watchdog.start()
    return watchdog


def check_references(module: nn.Module) -> None:
    """Expert Parameters are replaced by sharded ones in ``fit``: refuse where somebody would go on using the old ones.

    Raises:
        ValueError: a hook waits for the gradient of an expert Parameter, or another module or a container holds it.
    """
    names = {
        param: f"{name}.experts.{key}"
        for name, moe in moe_layers(module).items()
        for key, param in moe.experts.named_parameters()
    }
    for param, name in names.items():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook on its gradient, which would never be called: on several ranks expert gradients "
                "reach the Parameters by an exchange. Read them in on_after_backward, where they are complete"
            )
    owners = {param: moe.experts for moe in moe_layers(module).values() for param in moe.experts.parameters()}
    for owner, part in module.named_modules():
        for key, param in part._parameters.items():
            if param in owners and owners[param] is not part:
                raise ValueError(
                    f"{owner}.{key} and {names[param]} are one Parameter, but on several ranks each module of experts "
                    "is placed on its own: share the whole experts module instead, or give each a Parameter of its own"
                )
        for attribute, value in vars(part).items():
            if attribute in ("_parameters", "_modules", "_buffers"):
                continue
            for held in _tensors_in(value):
                if held in names:
                    raise ValueError(
                        f"{owner or type(module).__name__}.{attribute} holds {names[held]}, which is replaced by a "
                        "sharded Parameter in fit: look it up in the module when it is needed"
                    )


def _tensors_in(value: Any) -> list[nn.Parameter]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple, set)):
        return [value] if isinstance(value, nn.Parameter) else []
    return [item for item in value if isinstance(item, nn.Parameter)]


def _by_experts(module: nn.Module) -> list[dict[str, MoE]]:
    """``MoE`` layers by name, those with the same experts together."""
    groups: dict[nn.Module, dict[str, MoE]] = {}
    for name, moe in moe_layers(module).items():
        groups.setdefault(moe.experts, {})[name] = moe
    return list(groups.values())


def _attach(layer: ExpertLayer, parallelism: Parallelism, capacity_scope: CapacityScope) -> None:
    for name, moe in layer.moes.items():
        if parallelism.num_ranks > 1:
            dispatcher = HostDispatcher(layer, parallelism.tokens, name, capacity_scope)
            if parallelism.rows is not None:
                moe.attach(DeviceDispatcher(layer, parallelism.rows, name, capacity_scope, dispatcher))
            else:
                moe.attach(dispatcher)
            continue
        residents = None if layer.hosted.computes_with_parameters else torch.compiler.disable(layer.residents)
        local = LocalDispatcher(moe.num_experts, layer.placement, capacity_scope, residents)
        layer.local_dispatchers.append(local)
        moe.attach(local)
