"""``SwiftMoEStrategy``: the seams between Lightning and the sharded experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_swiftmoe._compat import (
    LightningOptimizer,
    TrainerFn,
    TrainerStatus,
    is_weight_averaging,
    trainer_callbacks,
)
from lightning_swiftmoe.callback import ExpertRebalancer
from lightning_swiftmoe.cluster import ClusterShape, resolve_slots
from lightning_swiftmoe.exchange import Exchange
from lightning_swiftmoe.layers.load import loads_to_host
from lightning_swiftmoe.layers.moe import MoE, moe_layers
from lightning_swiftmoe.optim import (
    BoundExperts,
    HostedExperts,
    ShardedExperts,
    canonical_state,
    check_optimizers,
    clip_grad_norm,
    insert_shards,
    load_canonical_state,
)
from lightning_swiftmoe.placement.capacity import CapacityScope, check_scope
from lightning_swiftmoe.step import Step

_EXPERTS: dict[str, type[HostedExperts]] = {"decoupled": ShardedExperts, "bound": BoundExperts}
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


class SwiftMoEStrategy(DDPStrategy):
    """Data parallelism for dense parameters, decoupled expert parallelism for every ``MoE`` layer in the module.

    The optimizer state of each expert is cut evenly over all ranks and never moves; expert weights live in slots and
    are placed anew after every step by the weight update itself (SwiftMoE, arXiv 2504.19925). Which expert goes
    where is the business of ``ExpertRebalancer``. For comparison, state can be bound to the hosts instead.

    Args:
        slots_per_rank: expert positions on each rank, with ``num_ranks * slots_per_rank >= num_experts``; ``"auto"``
            allows two replicas of every expert on average.
        offload_optimizer: keep master weights, moments and the optimizer's step on the host.
        capacity_scope: ``"cluster"``: an expert's capacity is shared by all ranks and grows with its replicas
            (SwiftMoE); ``"rank"``: every rank drops on its own, as DeepSpeed does.
        optimizer_state: ``"decoupled"``: cut evenly over all ranks (SwiftMoE); ``"bound"``: over the hosts of each
            expert, as in DeepSpeed and FlexMoE, and moved whenever an expert changes hosts.
        timeout: a collective that takes longer ends the job with the name of the exchange; ``timedelta`` or seconds.
        **kwargs: as for ``DDPStrategy``: ``start_method``, ``process_group_backend``, ...

    Raises:
        ValueError: a bad argument; on ``fit``, too few slots, an optimizer that cannot be sharded, a trainable expert
            parameter that no optimizer holds, a callback that averages weights by position.
    """

    def __init__(
        self,
        slots_per_rank: int | str = "auto",
        offload_optimizer: bool = False,
        capacity_scope: CapacityScope = "cluster",
        optimizer_state: str = "decoupled",
        timeout: timedelta | float = timedelta(minutes=10),
        **kwargs: Any,
    ) -> None:
        resolve_slots(slots_per_rank, 1, 1)
        check_scope(capacity_scope)
        if optimizer_state not in _EXPERTS:
            raise ValueError(f"optimizer_state must be one of {', '.join(_EXPERTS)}, got {optimizer_state!r}")
        timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        super().__init__(timeout=timeout, **kwargs)
        self.slots_per_rank, self.offload_optimizer = slots_per_rank, offload_optimizer
        self.capacity_scope, self._state_is = capacity_scope, optimizer_state
        self.layers: list[HostedExperts] = []
        self.exchange = Exchange()
        self._owners: dict[nn.Parameter, tuple[HostedExperts, str]] = {}
        self._masters: dict[str, Tensor] = {}
        self._failed = False

    # -- connecting and setting up -----------------------------------------------------------------------------------

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._failed = False
        trainer = model.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.precision not in _PRECISIONS:
            raise ValueError(
                f"precision {trainer.precision!r} is not supported; choose one of {', '.join(_PRECISIONS)}"
            )
        callbacks = trainer_callbacks(trainer)
        for callback in callbacks:
            if is_weight_averaging(callback):
                raise ValueError(
                    f"{type(callback).__name__} averages parameters by position, but slots hold other experts after "
                    "every step: remove it"
                )
        for name, moe in moe_layers(model).items():
            self._cluster_of(name, moe)
        if not any(isinstance(callback, ExpertRebalancer) for callback in callbacks):
            callbacks.append(ExpertRebalancer())

    @override
    def model_to_device(self) -> None:
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._shard_experts()
        super().model_to_device()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers, self.layers)
        self._owners = {}
        for optimizer in self.optimizers:
            owners = insert_shards(optimizer, self.layers)
            if owners and self._owners and self._state_is == "bound":
                raise ValueError(
                    "optimizer_state='bound' moves state when its optimizer's step ends, but several optimizers hold "
                    "experts: give all experts to one of them, or use optimizer_state='decoupled'"
                )
            self._owners |= owners
        # The plugin keeps its class: checkpoints find its state by the qualified name.
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]

    def _shard_experts(self) -> None:
        self.exchange = self._make_exchange()
        module = self._module
        ignored = []
        self.layers = []
        for name, moe in moe_layers(module).items():
            for key, param in moe.experts.named_parameters():
                self.exchange.broadcast(param.data, "setup", name)
                ignored.append(f"{name}.experts.{key}" if name else f"experts.{key}")
            masters = {
                key: self._masters[k]
                for key in dict(moe.experts.named_parameters())
                if (k := f"{name}.experts.{key}") in self._masters
            }
            self.layers.append(
                _EXPERTS[self._state_is](
                    moe,
                    name,
                    self.exchange,
                    self._rebalancer.first_placement(name, self._cluster_of(name, moe)),
                    compute_dtype=torch.bfloat16 if self._trainer.precision == "bf16-mixed" else None,
                    accumulates=self._accumulates,
                    offload=self.offload_optimizer,
                    capacity_scope=self.capacity_scope,
                    masters=masters,
                )
            )
        self._masters = {}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)

    def _make_exchange(self) -> Exchange:
        if self.exchange.group is not None:
            return self.exchange
        # A group of its own: DDP's buckets and our exchanges then never wait for each other's order.
        return Exchange(dist.new_group(timeout=self._timeout), self.root_device)

    def _cluster_of(self, name: str, moe: MoE) -> ClusterShape:
        num_ranks = self.num_nodes * self.num_processes
        slots = resolve_slots(self.slots_per_rank, moe.num_experts, num_ranks)
        try:
            return ClusterShape(num_ranks, slots, moe.num_experts, moe.capacity_factor is not None)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None

    # -- a step ------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.layers:
            layer.moe.aux_loss_scale = 1 / self._micro_batches
        return super().training_step(*args, **kwargs)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        for layer in self.layers:
            layer.dirty = True

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        def closure_and_gradient_phase() -> Any:
            result = closure()
            self.reduce_gradients()
            return result

        output = super().optimizer_step(optimizer, closure_and_gradient_phase, model, **kwargs)
        if any(param in self._owners for group in optimizer.param_groups for param in group["params"]):
            self._end_step(optimizer)
        return output

    def reduce_gradients(self) -> None:
        """Gradient phase of all layers; does nothing where no backward ran since the last one."""
        for layer in self.layers:
            layer.reduce_gradients()

    def _end_step(self, optimizer: Optimizer) -> None:
        """Choose the next placements; bound state follows them, and the weight phase carries them out."""
        steps = []
        loads = loads_to_host([layer.moe.pop_load(layer.placement.num_ranks) for layer in self.layers])
        for layer, load in zip(self.layers, loads, strict=True):
            cluster = self._cluster_of(layer.name, layer.moe)
            step = self._rebalancer.decide(layer.name, layer.moe, load, cluster)
            layer.move_state(step.next_placement, optimizer.state)
            layer.send_weights(step.next_placement)
            steps.append(step)
        self._rebalancer.end_step(Step(tuple(steps), self.exchange.pop_traffic()))

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.reduce_gradients()
        clip_grad_norm(self.precision_plugin.main_params(optimizer), self._owners.keys(), clip_val, self.exchange)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Canonical weights. While fitting this is collective, and only rank 0 receives the experts."""
        state = super().lightning_module_state_dict()
        self._refuse_after_failure()
        for layer in self.layers:
            for key, shard in layer.shards.items():
                full = layer.gather(key, shard, "checkpoint", to=0)
                name = f"{layer.name}.experts.{key}"
                if full is None:
                    del state[name]
                else:
                    state[name] = full.cpu()
        return state

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = dict(checkpoint["state_dict"])
        if not self.layers:
            # Lightning converts the module later: loading 64-true weights before that would round them to fp32.
            self.precision_plugin.convert_module(self._module)
            # Masters may be more precise than the module's own weights (bf16-true); keep them until sharding.
            self._masters = {
                f"{name}.experts.{key}": state[k]
                for name, moe in moe_layers(self._module).items()
                for key in dict(moe.experts.named_parameters())
                if (k := f"{name}.experts.{key}") in state
            }
            super().load_model_state_dict(checkpoint, strict)
            return
        names = {f"{layer.name}.experts.{key}": (layer, key) for layer in self.layers for key in layer.shards}
        experts = {name: state.pop(name) for name in names if name in state}
        missing, unexpected = self._module.load_state_dict(state, strict=False)
        missing = [name for name in missing if name not in experts]
        if strict and (missing or unexpected):
            raise RuntimeError(f"the checkpoint lacks {missing} and has unknown {unexpected}")
        for name, canonical in experts.items():
            layer, key = names[name]
            layer.load(key, canonical)
        for layer in self.layers:
            layer.send_weights(layer.placement)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Canonical state: what one process without a strategy would have saved. Collective; complete on rank 0."""
        self._refuse_after_failure()
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return canonical_state(optimizer, self._owners, to=0)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_canonical_state(optimizer, self._owners, state)

    def _refuse_after_failure(self) -> None:
        if self.layers and self._trainer.state.status == TrainerStatus.INTERRUPTED:
            raise RuntimeError(
                "experts are spread over all ranks and cannot be gathered after an exception on one of them; resume "
                "from the last checkpoint"
            )

    # -- ending ------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if self.layers and not (self._failed and self.exchange.num_ranks > 1):
            for layer in self.layers:
                layer.restore()
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._module, [])
        self.layers = []
        self.__dict__.get("_precision_plugin").__dict__.pop("clip_grad_by_norm", None)
        super().teardown()

    # -- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer

    @property
    def _rebalancer(self) -> ExpertRebalancer:
        return next(callback for callback in trainer_callbacks(self._trainer) if isinstance(callback, ExpertRebalancer))

    @property
    def _micro_batches(self) -> int:
        """Lightning divides the loss by this; manual optimization leaves the loss to the user."""
        return self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1

    @property
    def _accumulates(self) -> bool:
        """Whether a step may add up gradients of several backwards."""
        schedules = any(isinstance(c, GradientAccumulationScheduler) for c in trainer_callbacks(self._trainer))
        return self._micro_batches > 1 or schedules or not self._module.automatic_optimization
