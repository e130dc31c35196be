"""Sets up a user's module for several ranks: process groups, experts, layers and their dispatchers."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_swiftmoe.cluster import ClusterShape, ExpertGroup, resolve_group_size
from lightning_swiftmoe.layers.dispatchers import LocalDispatcher
from lightning_swiftmoe.layers.experts import expert_parameters
from lightning_swiftmoe.layers.layer import MoELayer, experts_name
from lightning_swiftmoe.parallel.abort import abort_all, abort_nccl
from lightning_swiftmoe.parallel.all_groups import CountsOfAllGroups
from lightning_swiftmoe.parallel.bound_experts import BoundExperts
from lightning_swiftmoe.parallel.communicator import Communicator
from lightning_swiftmoe.parallel.decoupled_experts import DecoupledExperts
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.find_layers import find_layers, planned_on_host
from lightning_swiftmoe.parallel.hosted_experts import HostedExperts, SavedWhole
from lightning_swiftmoe.parallel.mesh import ExpertMesh, Groups, forget_meshes
from lightning_swiftmoe.parallel.meta_start import FirstWeights, materialize_experts
from lightning_swiftmoe.parallel.nccl_rows import NcclRows
from lightning_swiftmoe.parallel.row_exchange import RowExchange, TokenBound
from lightning_swiftmoe.parallel.shard_exchange import ShardExchangeFactory
from lightning_swiftmoe.parallel.token_dispatcher import DeviceDispatcher, HostDispatcher
from lightning_swiftmoe.parallel.traffic import TrafficMeter
from lightning_swiftmoe.parallel.transports import choose_transport
from lightning_swiftmoe.parallel.watchdog import Watchdog, end_process
from lightning_swiftmoe.placement import Placement, TokenRule

_HOSTED: dict[str, type[HostedExperts]] = {"decoupled": DecoupledExperts, "bound": BoundExperts}
_COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, eq=False)
class Parallelism:
    """The ranks and what they talk through. Every group is our own: DDP's buckets and our exchanges never wait for each
    other's order, and ``close`` destroys what was made.

    Args:
        num_ranks: ranks of the job.
        device: where this rank computes.
        tokens: communicator for tokens, of this rank's expert group.
        state: communicator for expert weights and gradients, of this rank's expert group.
        everybody: communicator for initial weights, of all ranks.
        control: communicator for small facts on the host, of all ranks; None with one rank.
        meter: counts what the first three send.
        groups: for tokens, for state, and on the host; none with one rank.
        own: further groups to destroy.
        transport: how rows and expert state travel: ``"gloo"``, ``"nccl"`` or ``"symmetric"``.
        rows: carries rows planned on the device; None with ``"gloo"`` and with one rank.
        bound: of the assignments of a rank; None with one rank.
        watchdog: of exchanges on GPUs; None where the host waits for them, and so hears of a timeout itself.
        make_exchange: of expert state through memory that all ranks reach; None: it travels by all-to-all.
        token_replicas: for counts, one rank of each expert group; None where there is one group.
        state_replicas: for gradients, the same ranks.
    """

    num_ranks: int
    device: torch.device
    tokens: Communicator
    state: Communicator
    everybody: Communicator
    control: Communicator | None
    meter: TrafficMeter
    groups: tuple[Groups, ...] = ()
    own: tuple[dist.ProcessGroup, ...] = ()
    transport: str = "gloo"
    rows: RowExchange | None = None
    bound: TokenBound | None = None
    watchdog: Watchdog | None = None
    make_exchange: ShardExchangeFactory | None = None
    token_replicas: Communicator | None = None
    state_replicas: Communicator | None = None

    @classmethod
    def on(
        cls,
        device: torch.device,
        timeout: timedelta | None,
        transport: str = "auto",
        expert_parallel_size: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Parallelism:
        """All ranks of the job, in expert groups of that size. Collective.

        Args:
            device: of this rank.
            timeout: of an exchange.
            transport: how tokens and expert state travel.
            expert_parallel_size: ranks of a group; None: all.
            tell: is called with one line before a watchdog ends this process.

        Raises:
            ValueError: a transport that these ranks do not have.
        """
        meter = TrafficMeter()
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if num_ranks == 1:
            alone = Communicator(None, device, meter)
            return cls(1, device, alone, alone, alone, None, meter)
        size = resolve_group_size(expert_parallel_size, num_ranks)
        tokens, state = Groups.of(size, timeout), Groups.of(size, timeout)
        host = Groups.of(size, timeout, "gloo")
        own = () if size == num_ranks else (dist.new_group(timeout=timeout, backend="gloo"),)
        group_on_host = Communicator(host.experts)
        control = Communicator(own[0]) if own else group_on_host
        chosen = choose_transport(transport, device, group_on_host, control)
        bound = TokenBound(group_on_host)
        watchdog = _watchdog(device, timeout, control, tell)

        def communicator(group: dist.ProcessGroup | None) -> Communicator:
            return Communicator(group, device, meter, watchdog)

        of_tokens, of_state = communicator(tokens.experts), communicator(state.experts)
        rows, make_exchange = None, None
        if size > 1:
            rows, make_exchange = _device_exchanges(chosen, of_tokens, group_on_host, bound)
        elif chosen == "symmetric":
            chosen = "nccl"  # a group of one has no peers, and what crosses groups is all-reduced
        return cls(
            num_ranks,
            device,
            of_tokens,
            of_state,
            communicator(dist.group.WORLD) if own else of_state,
            control,
            meter,
            (tokens, state, host),
            own,
            chosen,
            rows,
            bound,
            watchdog,
            make_exchange,
            communicator(tokens.replicas) if own else None,
            communicator(state.replicas) if own else None,
        )

    @property
    def group_size(self) -> int:
        """Ranks of an expert group."""
        return self.tokens.num_ranks

    @property
    def expert_group(self) -> ExpertGroup:
        """Which of the job's groups this rank is in."""
        replicas = self.state_replicas
        return ExpertGroup() if replicas is None else ExpertGroup(replicas.rank, replicas.num_ranks)

    def expert_mesh(self, *, on_host: bool) -> ExpertMesh | None:
        """For what users see of sharded experts, on the host where they are offloaded; None in a group of one rank."""
        if self.group_size == 1:
            return None
        _, state, host = self.groups
        return host.expert_mesh("cpu") if on_host else state.expert_mesh(self.device.type)

    def close(self) -> None:
        """Destroy our process groups. Collective."""
        if self.watchdog is not None:
            self.watchdog.close()
        for group in self._created():
            dist.destroy_process_group(group)
        forget_meshes()

    def abort(self) -> None:
        """Leave without the other ranks, after an error. The default group is left when the process ends."""
        if self.device.type == "cuda":
            abort_nccl(self._created())
            atexit.register(abort_all)

    def _created(self) -> list[dist.ProcessGroup]:
        """Every group that is ours."""
        return [*(group for groups in self.groups for group in groups.all), *self.own]


class FirstPlacements(Protocol):
    """Says where experts start."""

    def first_placement(self, layer: str, cluster: ClusterShape, group: ExpertGroup) -> Placement:
        """The placement of ``layer`` to start with on the ranks of ``group``."""
        ...


def build_layers(
    module: nn.Module,
    parallelism: Parallelism,
    cluster_of: Callable[[str, MoELayer], ClusterShape],
    first: FirstPlacements,
    *,
    compute_dtype: str,
    accumulates: bool,
    gradient_dtype: torch.dtype | None,
    offload: bool,
    rule: TokenRule,
    state_place: str,
    masters: Mapping[str, Tensor | SavedWhole],
    seed: int,
) -> list[ExpertLayer]:
    """Shard the experts of ``module`` and attach its MoE layers; their Parameters are installed by the caller.

    Collective: every rank takes rank 0's weights. Those on the meta device are drawn, a part on each rank.

    Args:
        module: the user's.
        parallelism: the ranks.
        cluster_of: shape for a layer by name.
        first: where experts start.
        compute_dtype: Lightning's precision.
        accumulates, gradient_dtype, offload: as for ``HostedExperts``.
        rule: which assignments are kept, and who processes them.
        state_place: ``"decoupled"`` or ``"bound"``.
        masters: canonical weights of a checkpoint by name in ``module``, or where they are.
        seed: of the run, for weights that are drawn.
    """
    if parallelism.group_size == 1:
        materialize_experts(module, seed, parallelism.state)
    layers = []
    mesh = parallelism.expert_mesh(on_host=offload)
    for moes in _by_experts(module):
        name, moe = next(iter(moes.items()))
        prefix = experts_name(name, moe)
        cluster = cluster_of(name, moe)
        parameters = expert_parameters(moe.experts)
        for param in parameters.values():
            if not param.is_meta:
                parallelism.everybody.broadcast(param.data, "setup", name)
        hosted = _HOSTED[state_place](
            moe.experts,
            prefix,
            parallelism.state,
            mesh,
            first.first_placement(name, cluster, parallelism.expert_group),
            num_sharers=parallelism.num_ranks,
            replicas=parallelism.state_replicas,
            compute_dtype=_COMPUTE_DTYPES.get(compute_dtype),
            accumulates=accumulates,
            gradient_dtype=gradient_dtype,
            offload=offload,
            transient_copies=0 if planned_on_host(moe) else rule.transient_copies,
            make_exchange=parallelism.make_exchange,
            masters={key: masters[n] for key in parameters if (n := f"{prefix}.{key}") in masters},
            source=FirstWeights(module, moe.experts, prefix, seed, parallelism.state),
        )
        layer = ExpertLayer(name, moes, cluster, hosted)
        _attach(layer, parallelism, rule)
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


def _watchdog(
    device: torch.device, timeout: timedelta | None, control: Communicator, tell: Callable[[str], None] | None
) -> Watchdog | None:
    if device.type != "cuda" or timeout is None:
        return None
    end = partial(end_process, tell=tell)
    watchdog = Watchdog(timeout.total_seconds(), control.rank, control.num_ranks, end)
    watchdog.start()
    return watchdog


def check_references(module: nn.Module) -> None:
    """Expert Parameters are replaced by sharded ones in ``fit``: refuse where somebody would go on using the old ones.

    Raises:
        ValueError: a hook waits for the gradient of an expert Parameter, or another module or a container holds it.
    """
    names = {
        param: f"{experts_name(name, moe)}.{key}"
        for name, moe in find_layers(module).items()
        for key, param in expert_parameters(moe.experts).items()
    }
    for param, name in names.items():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook on its gradient, which would never be called: on several ranks expert gradients "
                "reach the Parameters by an exchange. Read them in on_after_backward, where they are complete"
            )
    all_experts = [moe.experts for moe in find_layers(module).values()]
    owners = {param: experts.module for experts in all_experts for param in expert_parameters(experts).values()}
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


def _by_experts(module: nn.Module) -> list[dict[str, MoELayer]]:
    """MoE layers by name, those with the same experts together."""
    groups: dict[nn.Module, dict[str, MoELayer]] = {}
    for name, moe in find_layers(module).items():
        groups.setdefault(moe.experts.module, {})[name] = moe
    return list(groups.values())


def _attach(layer: ExpertLayer, parallelism: Parallelism, rule: TokenRule) -> None:
    for name, moe in layer.moes.items():
        replicas = parallelism.token_replicas
        all_groups = None if replicas is None else CountsOfAllGroups(replicas, parallelism.num_ranks, name)
        if parallelism.group_size > 1:
            dispatcher = HostDispatcher(layer, parallelism.tokens, name, rule)
            if parallelism.rows is not None and not planned_on_host(moe):
                on_device = DeviceDispatcher(layer, parallelism.rows, name, rule, dispatcher)
                moe.attach(on_device, all_groups)
            else:
                moe.attach(dispatcher, all_groups)
            continue
        residents = None if layer.hosted.computes_with_parameters else torch.compiler.disable(layer.residents)
        local = LocalDispatcher(moe.num_experts, layer.placement, rule.capacity_scope, residents)
        layer.local_dispatchers.append(local)
        moe.attach(local, all_groups)
