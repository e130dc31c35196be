"""``SwiftMoEStrategy``: the seams between Lightning and the engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_swiftmoe._compat import (
    SIGTERMException,
    TrainerFn,
    asked_to_end,
    dump_checkpoint,
    is_weight_averaging,
    loss_scaler,
    pruned_by,
    requeue,
    run_closure,
    set_loss_scaler,
    trainer_callbacks,
    use_our_loop,
    validate_without_inference_mode,
)
from lightning_swiftmoe.arguments import (
    check,
    check_choice,
    check_flag,
    check_number,
    described,
    did_you_mean,
    is_integer,
)
from lightning_swiftmoe.callback import ExpertRebalancer, only_rebalancer
from lightning_swiftmoe.checkpoint.full import owners
from lightning_swiftmoe.checkpointing import CheckpointingStrategy, check_format
from lightning_swiftmoe.cluster import ClusterShape, check_group_size, resolve_group_size, resolve_slots
from lightning_swiftmoe.engine import ExpertEngine
from lightning_swiftmoe.launcher import SIGNAL_EXIT, ForkLauncher, ScriptLauncher
from lightning_swiftmoe.layers.layer import MoELayer, experts_name
from lightning_swiftmoe.optim import (
    check_optimizers,
    check_steps_on_shards,
    on_local_tensors,
    shared_scaler,
    unscale,
    use_installed_parameters,
    use_original_parameters,
)
from lightning_swiftmoe.parallel.bucket_order import fix_bucket_order
from lightning_swiftmoe.parallel.communicator import ExchangeError
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.find_layers import (
    advice,
    check_layers,
    find_layers,
    on_host_line,
    planned_on_host,
)
from lightning_swiftmoe.parallel.hosted_experts import check_unchanged
from lightning_swiftmoe.parallel.meta_start import experts_without_memory, keep_trained, without_meta
from lightning_swiftmoe.parallel.rehearsal import compile_layers
from lightning_swiftmoe.parallel.setup import Parallelism, build_layers, check_references
from lightning_swiftmoe.parallel.sharded_dense import ShardedDense, StepsThroughForward, check_whole
from lightning_swiftmoe.parallel.transports import check_transport
from lightning_swiftmoe.parallel.uneven_validation import UnevenValidation
from lightning_swiftmoe.placement import (
    CapacityScope,
    Split,
    TokenRule,
    token_rule,
    try_policy,
    with_chosen_copies,
)
from lightning_swiftmoe.precision import clipping_fused
from lightning_swiftmoe.redundancy import Assembled, Redundancy

_STATES = ("decoupled", "bound")
_DENSE = ("ddp", "fsdp2")
_ONLY_DDP = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}  # of Lightning's for DDP
_GRADIENT_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Of what reached several ranks the last counts.
_SIGNALS = (None, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_START_METHODS = ("popen", "spawn", "fork", "forkserver")
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed")


class SwiftMoEStrategy(CheckpointingStrategy):
    """Data parallelism for dense parameters, decoupled expert parallelism for every ``MoE`` layer in the module,
    and for the experts of every transformers model in it.

    The optimizer state of each expert is cut evenly over all ranks and never moves; expert weights live in slots and
    are placed anew after every step by the weight update itself (SwiftMoE, arXiv 2504.19925). Which expert goes
    where is the business of ``ExpertRebalancer``. For comparison, state can be bound to the hosts instead.

    Inside ``fit`` on several ranks, expert Parameters, their gradients and their optimizer state are canonical
    ``[E, rows, ...]`` tensors of which every rank holds a part (``ExpertTensor``, a ``DTensor``).

    Args:
        slots_per_rank: expert positions on each rank, with ``num_ranks * slots_per_rank >= num_experts``; ``"auto"``
            allows two replicas of every expert on average.
        expert_parallel_size: ranks that share one set of experts; it divides the ranks of the job. Consecutive ranks
            form a group that places experts, drops tokens and shards optimizer state for itself; gradients are then
            summed over the groups, whose weights stay equal. Metrics, traces and losses are of all ranks. None: all
            ranks are one group.
        offload_optimizer: keep master weights, moments and the optimizer's step on the host.
        capacity_scope: ``"pooled"``: the slots of a rank share their capacity, whichever experts they hold;
            ``"cluster"``: an expert's capacity is shared by all ranks and grows with its replicas (SwiftMoE);
            ``"rank"``: every rank drops on its own, as DeepSpeed does.
        split: of an expert's tokens over its hosts: ``"exact"`` on the loads of this very step, so that the busiest
            rank has as little as the placement allows; ``"even"`` by their slots (SwiftMoE).
        transient_copies: on a rank, at most, of experts that it borrows for one forward, where the split alone leaves
            ranks uneven; with ``split="exact"``. Where ranks reach each other's memory nothing waits for the host, and
            every layer has room for so many more experts; elsewhere, and with offloaded or bound state, the host plans.
            ``"auto"``: one or two where that needs no host, each for so many tokens that it saves time, else none;
            ``fit`` says what it chose and why.
        optimizer_state: ``"decoupled"``: cut evenly over all ranks (SwiftMoE); ``"bound"``: over the hosts of each
            expert, as in DeepSpeed and FlexMoE, and moved whenever an expert changes hosts.
        transport: how tokens and expert state travel: ``"symmetric"`` through memory that all ranks reach, ``"nccl"``,
            ``"gloo"``; ``"auto"`` takes the first of them that works.
        timeout: a collective that takes longer ends the job with the name of the exchange; ``timedelta`` or seconds.
        trust_optimizer: leave out the trial that every optimizer unknown to torch must pass: the user vouches that it
            updates each weight of an expert from that weight's own gradient and state alone.
        gradient_dtype: in which experts' gradients travel: ``"auto"``: as they were computed, or in fp32 where those
            of several backwards add up; ``"bfloat16"``: rounded to half the bytes of fp32; ``"float32"``. They are
            added in at least fp32 in any case.
        checkpoint: ``"full"``: one file, gathered and written by rank 0; ``"sharded"``: a folder, to which every rank
            writes what it holds. Both load on any number of ranks, whatever is set here.
        redundancy: 1; or 2: every shard has a second owner, on another node where there is one, who steps alike. Where
            a rank dies, those left save a checkpoint from memory, under ``rescue`` in the Trainer's
            ``default_root_dir``, which all ranks must see, and end with exit code 75. It costs memory for one more
            shard, and a message of gradients a step.
        async_save: write sharded checkpoints while training goes on, from a copy on the host. A checkpoint has its name
            once it is whole; the next save, and the end of ``fit``, wait for it and raise what went wrong.
        dense: what becomes of Parameters outside of experts: ``"ddp"``: every rank has them; ``"fsdp2"``: cut over all
            ranks, with gradients and optimizer state, and gathered for the block that needs them; blocks are the
            elements of ``nn.ModuleList``s. Their gradients are reduced in every backward, also of batches that add up.
        **kwargs: as for ``DDPStrategy``: ``start_method``, ``process_group_backend``, ...

    Raises:
        ValueError: a bad argument; on ``fit``, too few slots, an optimizer that cannot be sharded, a trainable expert
            parameter that no optimizer holds, a callback that averages weights by position, several rebalancers, or a
            policy that returns no placement.
    """

    def __init__(
        self,
        slots_per_rank: int | str = "auto",
        offload_optimizer: bool = False,
        capacity_scope: CapacityScope = "pooled",
        optimizer_state: str = "decoupled",
        transport: str = "auto",
        timeout: timedelta | float = timedelta(minutes=10),
        expert_parallel_size: int | None = None,
        trust_optimizer: bool = False,
        gradient_dtype: str = "auto",
        checkpoint: str = "full",
        async_save: bool = False,
        redundancy: int = 1,
        split: Split = "exact",
        transient_copies: int | Literal["auto"] = 0,
        dense: str = "ddp",
        **kwargs: Any,
    ) -> None:
        resolve_slots(slots_per_rank, 1, 1)
        self.rule = token_rule(capacity_scope, split, transient_copies)
        self.transient_copies = transient_copies
        check_transport(transport)
        check_choice("optimizer_state", optimizer_state, _STATES)
        check_group_size(expert_parallel_size)
        if optimizer_state == "bound" and expert_parallel_size is not None:
            raise ValueError(
                f"expert_parallel_size = {expert_parallel_size} needs optimizer_state='decoupled': state bound to "
                "hosts is kept for one group of all ranks only"
            )
        check_choice("gradient_dtype", gradient_dtype, tuple(_GRADIENT_DTYPES))
        check_flag("offload_optimizer", offload_optimizer)
        _check_redundancy(redundancy, optimizer_state)
        _check_dense(dense, redundancy, kwargs)
        check_flag("trust_optimizer", trust_optimizer)
        _check_names(kwargs)
        check_choice("start_method", kwargs.get("start_method", "popen"), _START_METHODS)
        check_format(checkpoint, async_save, optimizer_state)
        sharded = checkpoint == "sharded"
        super().__init__(sharded=sharded, async_save=async_save, timeout=_as_timedelta(timeout), **kwargs)
        self.slots_per_rank = slots_per_rank
        self.offload_optimizer = offload_optimizer
        self.state_place = optimizer_state
        self.transport = transport
        self.expert_parallel_size = expert_parallel_size
        self.trust_optimizer = trust_optimizer
        self.gradient_dtype = gradient_dtype
        self.redundancy = redundancy
        self.dense = dense
        self._redundant: Redundancy | None = None
        self.validation: UnevenValidation | None = None
        self._own_precision: Precision | None = None  # the user's plugin, while one like it stands in for it
        self._own_scaler: GradScaler | None = None  # the plugin's, while a shared one stands in for it
        self._rebalancer = ExpertRebalancer()
        self._failed = False

    # -- connecting and setting up -----------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        # Ranks that torchrun or SLURM started would each fork as many again.
        if self._start_method == "popen" or self.cluster_environment.creates_processes_externally:
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ForkLauncher(self, start_method=self._start_method)

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._failed = self._ends_together = False
        self._before_loading = None
        self._experts = {}
        self._dense = None
        trainer = model.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_precision(trainer.precision)
        if self.redundancy == 2 and trainer.precision == "16-mixed":
            raise ValueError("redundancy=2 does not know of fp16's loss scale: use precision='bf16-mixed'")
        for callback in trainer_callbacks(trainer):
            if is_weight_averaging(callback):
                raise ValueError(
                    f"{type(callback).__name__} averages parameters by position, but slots hold other experts after "
                    "every step: use lightning_swiftmoe.WeightEMA in its place"
                )
        for name, moe in find_layers(model).items():
            check_unchanged(moe.experts, experts_name(name, moe))
            self._cluster_of(name, moe)
        if self.num_nodes * self.num_processes > 1:
            check_layers(model)
            check_references(model)
        use_our_loop(trainer)
        if self.dense == "fsdp2":
            validate_without_inference_mode(trainer)

    @override
    def setup_environment(self) -> None:
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._choose_rebalancer()
        super().setup_environment()

    def _choose_rebalancer(self) -> None:
        """Not before the module's own callbacks have come, and not after a process group."""
        callbacks = trainer_callbacks(self._trainer)
        found = only_rebalancer(callbacks)
        if found is None:
            found = ExpertRebalancer()
            callbacks.append(found)
        self._rebalancer = found
        for cluster in {self._cluster_of(name, moe) for name, moe in find_layers(self._module).items()}:
            try_policy(found.rebalancing.policy, cluster)

    @override
    def model_to_device(self) -> None:
        if self._trainer.state.fn != TrainerFn.FITTING:
            self.fill_in(experts=True)
            super().model_to_device()
            return
        self._refuse_pruning()
        check_whole(self._module)
        self._make_engine(self.fill_in(experts=False))
        for hosted in self._experts.values():
            hosted.withdraw()
        super().model_to_device()
        for hosted in self._experts.values():
            hosted.install()
        self._compile()
        self._take_precision()

    def _take_precision(self) -> None:
        """The user's plugin gets a scaler of all ranks, and one like it stands in for it."""
        self._own_precision = self.precision_plugin
        scaler = loss_scaler(self._own_precision)
        if scaler is not None and self.num_nodes * self.num_processes > 1:
            self._own_scaler = scaler
            set_loss_scaler(self._own_precision, shared_scaler(scaler, self.root_device.type))
        self.precision_plugin = clipping_fused(self._own_precision)

    def _refuse_pruning(self) -> None:
        """Before training, which a callback would let go on for an epoch; its ``setup`` says what it prunes."""
        experts = {moe.experts.module: experts_name(name, moe) for name, moe in find_layers(self._module).items()}
        for callback in trainer_callbacks(self._trainer):
            for module, key in pruned_by(callback):
                if module in experts:
                    raise ValueError(
                        f"{type(callback).__name__} prunes {experts[module]}.{key}, which would not reach the weights "
                        "that ranks compute with: leave experts out of parameters_to_prune, or multiply their weights "
                        "by a mask in on_train_batch_end"
                    )

    def _compile(self) -> None:
        """Before DDP comes: it would take the rehearsal for a step."""
        assert self.engine is not None
        assert self.parallelism is not None
        layers = [layer for layer in self.engine.layers if isinstance(layer, ExpertLayer)]
        compile_layers(layers, self.parallelism, self.precision_plugin.forward_context, rank_zero_info)
        self.engine.forget()

    @override
    def configure_ddp(self) -> None:
        # With one rank, or nothing dense to train, there is nothing to reduce; DDP would copy, or refuse.
        experts = owners(self._experts)
        trains_dense = any(param.requires_grad and param not in experts for param in self._module.parameters())
        if not trains_dense or self.num_nodes * self.num_processes == 1:
            return
        if self.dense == "ddp":
            super().configure_ddp()
            return
        assert self.parallelism is not None
        self._dense = ShardedDense(self._module, experts, self.parallelism.everybody)
        self.model = StepsThroughForward(self._module, self._dense, by_hand=not self._module.automatic_optimization)

    @override
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        # Before the user's communication hooks, which need not hear of it.
        ddp = super()._setup_model(model)
        fix_bucket_order(ddp)
        return ddp

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            use_installed_parameters(optimizer, self._holders.values())
        check_optimizers(self.optimizers, self._experts, trusted=self.trust_optimizer)
        if self._dense is not None and not self.trust_optimizer:
            check_steps_on_shards(self.optimizers, self._dense)
        if self.state_place == "bound":
            self._check_one_optimizer()
        if self.redundancy == 2 and self._experts and self.num_nodes * self.num_processes > 1:
            self._check_held()
            assert self.parallelism is not None
            self._redundant = Redundancy(trainer, self.parallelism, self.optimizers, owners(self._experts), self._dump)
            if isinstance(self._launcher, (ScriptLauncher, ForkLauncher)):
                self._launcher.before_leaving = self._redundant.wait_if_ranks_are_lost

    def _check_held(self) -> None:
        held = {param for optimizer in self.optimizers for group in optimizer.param_groups for param in group["params"]}
        for name, hosted in self._experts.items():
            for key, param in hosted.parameters.items():
                if param not in held:
                    raise ValueError(
                        f"redundancy=2 copies what optimizers hold, and none holds {name}.{key}: give an optimizer all "
                        "experts, frozen ones too"
                    )

    def _dump(self, experts: Assembled) -> dict[str, Any]:
        """For ranks that are left."""
        assert self.engine is not None
        self.engine.abandon_step()
        self._assembled = experts
        try:
            return dump_checkpoint(self._trainer)
        finally:
            self._assembled = None

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._redundant is not None:
            self._redundant.begin()

    def before_batch(self) -> None:
        """At the head of every step."""
        if self._redundant is not None:
            self._redundant.before_batch()

    def _make_engine(self, seed: int) -> None:
        self.parallelism = Parallelism.on(
            self.root_device, self._timeout, self.transport, self.expert_parallel_size, self.on_hang
        )
        module = self._module
        layers = build_layers(
            module,
            self.parallelism,
            self._cluster_of,
            self._rebalancer.state,
            compute_dtype=self._trainer.precision,
            accumulates=self._accumulates,
            gradient_dtype=_GRADIENT_DTYPES[self.gradient_dtype],
            offload=self.offload_optimizer,
            rule=self._rule_on(self.parallelism),
            state_place=self.state_place,
            masters=self._masters,
            seed=seed,
        )
        self._masters = {}
        self._experts = {experts_name(name, moe): x.hosted for x in layers for name, moe in x.moes.items()}
        ignored = [f"{name}.{key}" for name, hosted in self._experts.items() for key in hosted.parameters]
        if self.parallelism.num_ranks > 1:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        self.engine = ExpertEngine(
            layers,
            self._rebalancer.rebalancing,
            self._rebalancer.state,
            self.parallelism.meter,
            self.parallelism.control,
            self.parallelism.expert_group,
        )
        self._prepare_validation(layers)
        self._rebalancer.follow(self.engine)
        if not layers:
            rank_zero_warn(
                f"{type(module).__name__} has no MoE layer, and is trained as by DDP: make layers of "
                "lightning_swiftmoe.MoE in its __init__ or configure_model, or hold a transformers model with experts"
            )
        hints = [advice(module), on_host_line(module) if self.parallelism.rows is not None else None]
        for hint in filter(None, hints):
            rank_zero_info(hint)

    def _rule_on(self, parallelism: Parallelism) -> TokenRule:
        """The rule, once it is known what ``transient_copies="auto"`` comes to."""
        if self.transient_copies != "auto":
            return self.rule
        moes = find_layers(self._module)
        clusters = {self._cluster_of(name, moe) for name, moe in moes.items()}
        obstacle = None
        if parallelism.group_size == 1:
            obstacle = "an expert group is one rank"
        elif parallelism.transport != "symmetric":
            obstacle = f"with transport={parallelism.transport!r} they would have to be planned on the host"
        elif self.state_place == "bound" or self.offload_optimizer:
            obstacle = "with bound or offloaded state they would have to be planned on the host"
        elif any(map(planned_on_host, moes.values())):
            obstacle = "some experts are not what our kernels compute, and would have to be planned on the host"
        rule, line = with_chosen_copies(self.rule, clusters, obstacle)
        say = rank_zero_info if rule.transient_copies else rank_zero_warn
        say(line)
        return rule

    def _prepare_validation(self, layers: Sequence[ExpertLayer]) -> None:
        """Ranks will validate together. Lightning asks every rank alone whether there is something to validate.

        Raises:
            ValueError: only some ranks validate.
        """
        assert self.parallelism is not None
        if self.parallelism.control is None:
            return
        mine = torch.tensor([int(self._trainer.enable_validation)])
        everybody = self.parallelism.control.gather_counts(mine, "validation").flatten().tolist()
        idle = [rank for rank, validates in enumerate(everybody) if not validates]
        if idle and len(idle) < len(everybody):
            raise ValueError(
                f"rank(s) {idle} have no validation data or limit_val_batches=0, the others validate: give all ranks "
                "the same"
            )
        moes = {name: moe for layer in layers for name, moe in layer.moes.items()}
        begin = partial(self._begin_forward, training=False)
        everybody_runs = self.dense == "fsdp2"
        self.validation = UnevenValidation(
            moes, self.root_device, self.parallelism.control, begin, everybody_runs=everybody_runs
        )
        for layer in layers:
            layer.before_tokens = self.validation.layer

    def _cluster_of(self, name: str, moe: MoELayer) -> ClusterShape:
        num_ranks = resolve_group_size(self.expert_parallel_size, self.num_nodes * self.num_processes)
        slots = resolve_slots(self.slots_per_rank, moe.num_experts, num_ranks)
        try:
            return ClusterShape(num_ranks, slots, moe.num_experts, self.rule.caps_experts(moe.capacity_factor))
        except ValueError as error:
            where = f"layer {name!r}"
            if self.expert_parallel_size is not None:
                where += f" with expert_parallel_size = {self.expert_parallel_size}"
            raise ValueError(f"{where}: {error}") from None

    def _check_one_optimizer(self) -> None:
        experts = owners(self._experts)
        holders = [opt for opt in self.optimizers if any(p in experts for g in opt.param_groups for p in g["params"])]
        if len(holders) > 1:
            raise ValueError(
                "optimizer_state='bound' moves state when its optimizer's step ends, but several optimizers hold "
                "experts: give all experts to one of them, or use optimizer_state='decoupled'"
            )

    # -- a step ------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.engine is not None:
            self._begin_forward(training=True)
            scale = self._aux_loss_scale()
            for name, moe in find_layers(self._module).items():
                self._refuse_stranger(name, moe)
                check_unchanged(moe.experts, experts_name(name, moe))
                moe.aux_loss_scale = scale
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.engine is not None:
            self._begin_forward(training=False)
        return super().validation_step(*args, **kwargs)

    @staticmethod
    def _refuse_stranger(name: str, moe: MoELayer) -> None:
        """Its experts would train on every rank alone, or not at all."""
        if not moe.is_attached:
            raise RuntimeError(
                f"layer {name!r} came into the module after the strategy was set up: put MoE layers there in __init__ "
                "or configure_model"
            )

    def end_where_asked(self) -> None:
        """End the fit on all ranks if a signal reached one. At the head of every step; the hosts wait for each other.

        Callbacks may save checkpoints on the exception: all ranks are there.

        Raises:
            SIGTERMException: a signal came; the exit code says which.
        """
        assert self.parallelism is not None
        asked = asked_to_end(self._trainer)
        rank = 0 if asked is None else _SIGNALS.index(asked)
        if self.parallelism.control is not None:
            rank = self.parallelism.control.largest(rank, "signal")
        found = _SIGNALS[rank]
        if found is None:
            return
        self._ends_together = True
        rank_zero_info(f"{found.name} came: all ranks end, {self._trainer.global_step} steps are done")
        if isinstance(self._launcher, (ScriptLauncher, ForkLauncher)):
            self._launcher.ends_together()
        if found == signal.SIGUSR1:
            requeue(self._trainer)
        raise SIGTERMException(SIGNAL_EXIT + found)

    def _begin_forward(self, *, training: bool) -> None:
        assert self.engine is not None
        assert self.parallelism is not None
        self.engine.begin_forward(training=training)
        if self.parallelism.bound is not None:
            self.parallelism.bound.begin_forward()

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self.engine is not None:
            self.engine.begin_backward(closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if self._dense is not None:
            self._dense.check_reduced()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients add up where they are; the next backward outside exchanges them."""
        with super().block_backward_sync():
            if self.engine is None:
                yield
                return
            self.engine.gradients.syncing = False
            try:
                yield
            finally:
                self.engine.gradients.syncing = True

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self.engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        engine = self.engine

        scaler = loss_scaler(self.precision_plugin)
        is_scaled = scaler is not None

        def closure_and_flush() -> Any:
            nonlocal is_scaled
            result = closure()
            engine.gradients.flush()
            # As Lightning has it: automatic optimization without a loss made no gradients.
            is_scaled = is_scaled and not (result is None and self._module.automatic_optimization)
            if scaler is not None and is_scaled:
                unscale(scaler, optimizer)  # before they are clipped
            return result

        # Lightning runs the closure inside of the optimizer's step; ours must be over before tensors change places.
        result = run_closure(self.precision_plugin, model or self._module, optimizer, closure_and_flush)
        if self._dense is not None:
            self._dense.reshard()

        def plain_step() -> Any:
            return optimizer.step(closure=lambda: result, **kwargs)

        def step() -> Any:
            with on_local_tensors(optimizer):
                if scaler is None:
                    return plain_step()
                output = scaler.step(optimizer, **kwargs)
                scaler.update()
                return output

        if scaler is not None and not is_scaled:
            return result
        if self._steps_taken > 0:
            self._steps_taken -= 1
            output = result
        elif self._redundant is not None:
            output = self._redundant.step(optimizer, plain_step, step)
        else:
            output = step()
        engine.stepped([other.state for other in self.optimizers])
        return output

    def _aux_loss_scale(self) -> float | Tensor:
        """Lightning divides the loss by the batches that add up, and multiplies it by fp16's scale, behind our back."""
        scaler = loss_scaler(self.precision_plugin)
        share = 1 / self._micro_batches
        return share if scaler is None else scaler.scale(torch.ones((), device=self.root_device)) * share

    # -- ending ------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self._ends_together and isinstance(exception, SIGTERMException):
            super().on_exception(exception)
            return
        if self._redundant is not None:
            self._redundant.wait_if_ranks_are_lost()
        self._failed = True
        self._ends_together = False
        if isinstance(self._launcher, (ScriptLauncher, ForkLauncher)) and not isinstance(exception, KeyboardInterrupt):
            self._launcher.failed(self.global_rank, exception)
        if self.parallelism is not None and self.parallelism.num_ranks > 1:
            self.parallelism.abort()
        super().on_exception(exception)

    def job_failed(self) -> bool:
        """Whether another rank is known to have failed, so that there is nothing to end together."""
        return isinstance(self._launcher, ForkLauncher) and self._launcher.is_ending()

    def on_hang(self, line: str) -> None:
        """An exchange on the device does not end, and this process is about to: tell those who started it.

        Args:
            line: which one, and for how long.
        """
        if self._redundant is not None:
            self._redundant.wait_if_ranks_are_lost()
        if isinstance(self._launcher, (ScriptLauncher, ForkLauncher)):
            self._launcher.ends_now(self.global_rank, ExchangeError(line))

    @override
    def teardown(self) -> None:
        parallelism = self.parallelism
        self._put_precision_back()
        if self._redundant is not None:
            self._redundant.leave()
            self._redundant = None
        if parallelism is not None and not (self._failed and parallelism.num_ranks > 1):
            self.finish_saving()
            self._rebalancer.leave()
            for hosted in dict.fromkeys(self._experts.values()):
                hosted.restore()
                keep_trained(hosted)
            if experts_without_memory(self._module):
                rank_zero_info(
                    "experts stay in parts on all ranks, as they were built on the meta device: "
                    "trainer.strategy.gather_experts() makes them whole on each"
                )
            if self._dense is not None:
                self._dense.restore()
            for optimizer in self.optimizers:
                use_original_parameters(optimizer, self._holders.values())
            self._detach_layers()
            parallelism.close()
        elif self._dense is not None:
            self._dense.abandon()
        if self._failed and self._before_loading is not None:
            self._put_back()
        self.engine = None
        self.validation = None
        self.parallelism = None
        if isinstance(self.model, StepsThroughForward):
            self.model = self._module
        with without_meta(self._module):
            super().teardown()

    def _put_back(self) -> None:
        """``fit`` failed before training: the module is what it was before weights were loaded, without other ranks."""
        assert self._before_loading is not None
        self._before_loading.put_back()
        for optimizer in self.optimizers:
            use_original_parameters(optimizer, self._holders.values())
        self._detach_layers()

    def _put_precision_back(self) -> None:
        if self._own_precision is None:
            return
        self.precision_plugin = self._own_precision
        self._own_precision = None
        if self._own_scaler is None:
            return
        scaler = loss_scaler(self.precision_plugin)
        if scaler is not None and not self._failed:
            self._own_scaler.load_state_dict(scaler.state_dict())
        set_loss_scaler(self.precision_plugin, self._own_scaler)
        self._own_scaler = None

    def _detach_layers(self) -> None:
        for moe in find_layers(self._module).values():
            moe.detach()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._module, [])

    # -- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _micro_batches(self) -> int:
        """Lightning divides the loss by this; manual optimization leaves the loss to the user."""
        return self._trainer.accumulate_grad_batches if self._module.automatic_optimization else 1

    @property
    def _accumulates(self) -> bool:
        """Whether gradients of several backwards may add up before they are exchanged."""
        schedules = any(isinstance(c, GradientAccumulationScheduler) for c in trainer_callbacks(self._trainer))
        return self._micro_batches > 1 or schedules


def check_precision(precision: str) -> None:
    """Raise a ValueError for a precision in which experts cannot be trained."""
    if precision not in _PRECISIONS:
        raise ValueError(f"precision {precision!r} is not supported; choose one of {', '.join(_PRECISIONS)}")


def _check_redundancy(redundancy: int, optimizer_state: str) -> None:
    check(is_integer(redundancy) and redundancy in (1, 2), "redundancy", redundancy, "1 or 2")
    if redundancy == 2 and optimizer_state == "bound":
        raise ValueError("redundancy=2 needs optimizer_state='decoupled': state bound to hosts has no second owner")


def _check_dense(dense: str, redundancy: int, kwargs: Mapping[str, Any]) -> None:
    check_choice("dense", dense, _DENSE)
    if dense == "ddp":
        return
    if redundancy == 2:
        raise ValueError("redundancy=2 needs dense='ddp': what FSDP2 shards has no second owner")
    of_ddp = sorted(kwargs.keys() & (signature(DistributedDataParallel.__init__).parameters.keys() | _ONLY_DDP))
    if of_ddp:
        raise ValueError(f"{', '.join(of_ddp)} is for DDP, and dense='fsdp2' does without it: leave it out")


def _as_timedelta(timeout: timedelta | float) -> timedelta:
    if not isinstance(timeout, timedelta):
        check_number("timeout", timeout, "a timedelta, or seconds above zero", above=0)
        timeout = timedelta(seconds=timeout)
    check(timeout > timedelta(0), "timeout", timeout, "a timedelta, or seconds above zero")
    return timeout


def _check_names(kwargs: Mapping[str, Any]) -> None:
    """``DDPStrategy`` hands what it does not know on to DDP, which is not made on one rank.

    Raises:
        TypeError: neither of them has an argument of that name; says which one may have been meant.
    """
    ours, lightnings, torchs = (
        set(signature(cls.__init__).parameters) - {"self", "kwargs", "module"}
        for cls in (SwiftMoEStrategy, DDPStrategy, DistributedDataParallel)
    )
    for name in kwargs.keys() - lightnings - torchs:
        if name in signature(ExpertRebalancer).parameters:
            hint = f": it belongs to a callback, ExpertRebalancer({name}={described(kwargs[name])})"
        else:
            hint = did_you_mean(name, sorted(ours | lightnings | torchs))
        hint = hint or f"; there are {', '.join(sorted(ours))} and DDPStrategy's"
        raise TypeError(f"SwiftMoEStrategy got an unexpected keyword argument {name!r}{hint}")
