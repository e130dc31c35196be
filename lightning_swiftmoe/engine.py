"""``ExpertEngine``: the one owner of placements and of the order of a training step.

A step, as the engine sees it:

1. ``begin_forward``: weights start on their way to the slots, in the order of the layers; a layer waits for its own.
2. the backward: a layer's gradients start on their way to the shards as soon as autograd has them, in one fixed order.
3. ``end_backward``: all of them have arrived and joined ``.grad`` of the Parameters.
4. ``stepped``: an optimizer changed the Parameters.
5. ``end_step``: loads, on the host since the forward, decide the next placement; observers hear of the step.

Lightning's hooks call these; so does the virtual cluster, whose layers exchange nothing.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Variable

from lightning_swiftmoe.cluster import ClusterShape, ExpertGroup
from lightning_swiftmoe.layers.layer import MoELayer
from lightning_swiftmoe.layers.load import HostLoad, HostLoads, LayerLoad, no_load
from lightning_swiftmoe.parallel.communicator import Communicator, Pending
from lightning_swiftmoe.parallel.expert_layer import ExpertLayer
from lightning_swiftmoe.parallel.hosted_experts import Locals
from lightning_swiftmoe.parallel.traffic import TrafficMeter
from lightning_swiftmoe.placement import Placement, PlacementPolicy, next_placement, uniform
from lightning_swiftmoe.placement.placement import IntArray
from lightning_swiftmoe.placement.policies import name_of
from lightning_swiftmoe.step import LayerStep, Step

Observer = Callable[[Step], None]
ONE_GROUP = ExpertGroup()


@dataclass(frozen=True)
class Rebalancing:
    """How placements are decided.

    Args:
        policy: from loads to the next placement.
        every_n_steps: decide on every n-th step, from the loads added up since the last decision.
    """

    policy: PlacementPolicy
    every_n_steps: int = 1


@dataclass
class EngineState:
    """What a checkpoint keeps of an engine.

    Args:
        steps: taken so far.
        placements: the table of each layer, of all ranks.
        loads: of each layer since the last decision, by expert group and expert.
    """

    steps: int = 0
    placements: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Any] = field(default_factory=dict)

    def first_placement(self, layer: str, cluster: ClusterShape, group: ExpertGroup = ONE_GROUP) -> Placement:
        """The placement to start with: the checkpoint's where it fits this cluster, else a uniform one.

        Args:
            layer: its name.
            cluster: the ranks of one expert group.
            group: which one.
        """
        table = self.placements.get(layer)
        if table is None or np.shape(table) != (group.count * cluster.num_ranks, cluster.slots_per_rank):
            return uniform(cluster)
        mine = group.rows(np.array(table))
        # Larger groups wrote it: half of one may lack experts.
        if np.unique(mine).size < cluster.num_experts:
            return uniform(cluster)
        return Placement(mine, cluster.num_experts)

    def first_loads(self, num_groups: int) -> dict[str, IntArray]:
        """``[G, E]`` of each layer since the last decision; where the groups were others, they share evenly."""
        loads = {}
        for layer, counts in self.loads.items():
            by_group = np.atleast_2d(np.array(counts, dtype=np.int64))
            if len(by_group) != num_groups:
                by_group = np.tile(by_group.sum(axis=0) // num_groups, (num_groups, 1))
            loads[layer] = by_group
        return loads


class EngineLayer(Protocol):
    """A layer that the engine decides for."""

    name: str
    moes: Mapping[str, MoELayer]
    cluster: ClusterShape
    placement: Placement

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def adopt(self, placement: Placement, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take the placement of the next weight phase."""
        ...

    def start_weights(self) -> None:
        """Weight phase."""
        ...


class ExpertEngine:
    """Drives ``layers`` through training.

    Args:
        layers: in the order of their forwards.
        rebalancing: the policy and its cadence.
        state: of a checkpoint; None starts anew.
        meter: counts what the layers' communicators send.
        control: all ranks on their hosts, who make sure that expert groups decided alike; None with one rank.
        group: this rank's expert group, which decides from its own loads.
    """

    def __init__(
        self,
        layers: Sequence[EngineLayer],
        rebalancing: Rebalancing,
        state: EngineState | None = None,
        meter: TrafficMeter | None = None,
        control: Communicator | None = None,
        group: ExpertGroup = ONE_GROUP,
    ) -> None:
        self.layers = list(layers)
        self.rebalancing = rebalancing
        self.meter = meter or TrafficMeter()
        self.observers: list[Observer] = []
        self._control = control
        self._group = group
        self._gradients = GradientPhase([layer for layer in layers if isinstance(layer, ExpertLayer)])
        state = state or EngineState()
        self._steps = state.steps
        self._loads = state.first_loads(group.count)
        self._everywhere = {layer.name: self._first_everywhere(state, layer) for layer in self.layers}
        moes = {name: moe for layer in self.layers for name, moe in layer.moes.items()}
        # For the others even the sum of the loads would be for nothing.
        self._balancing = {name: moe for name, moe in moes.items() if moe.balances_itself}
        self._moe_loads: dict[str, LayerLoad] = {}
        self._host_loads: HostLoads | None = None
        self._stepped = False
        self._stale = True
        self._was_training: bool | None = None
        self._optimizer_states: Mapping[Tensor, dict[str, Any]] = {}
        for layer in self.layers:
            if isinstance(layer, ExpertLayer):
                layer.before_forward = self._before_layer

    # -- forward -----------------------------------------------------------------------------------------------------

    def begin_forward(self, *, training: bool) -> None:
        """A batch is about to run: after a step, and between training and evaluation, weights are sent anew.

        What users did to Parameters in between counts, whatever way they did it.
        """
        self.end_step()
        if self._stale or training != self._was_training:
            self._start_weights()
        self._was_training = training

    def weights_changed(self) -> None:
        """Parameters were overwritten: the next forward needs them."""
        self._stale = True

    def forget(self) -> None:
        """Whatever ran so far was no training: drop its gradients and traffic; the first step needs fresh weights."""
        self._gradients.reset()
        self.meter.pop()
        self._stale = True

    def abandon_step(self) -> None:
        """Training is over, and other ranks may be gone: nothing is decided on the step that is under way."""
        self._stepped = False

    def _before_layer(self) -> None:
        """A forward that nobody announced, such as one between two optimizers' steps in a manual training step."""
        if self._stale:
            self._start_weights()

    def _start_weights(self) -> None:
        self._stale = False
        for layer in self.layers:
            layer.start_weights()

    # -- backward ----------------------------------------------------------------------------------------------------

    @property
    def gradients(self) -> GradientPhase:
        """The gradient phase: what a backward does."""
        return self._gradients

    def begin_backward(self, loss: Tensor) -> None:
        """Loads start on their way to the host, and gradients will be complete when the backward of ``loss`` ends."""
        self._take_loads()
        self._gradients.begin(loss)

    # -- the step's end ----------------------------------------------------------------------------------------------

    def stepped(self, states: Iterable[MutableMapping[Tensor, dict[str, Any]]] = ()) -> None:
        """An optimizer changed Parameters.

        Args:
            states: ``optimizer.state`` of every optimizer.
        """
        self._stepped = True
        self._stale = True
        # Copies: asked for what they lack, the dictionaries of optimizers make it, and others would not be asked.
        self._optimizer_states = ChainMap(*map(dict, states))
        self._gradients.reset()

    def end_step(self) -> None:
        """Decide the next placements and tell the observers; does nothing where no optimizer stepped since last time.

        Raises:
            RuntimeError: ranks decided differently.
        """
        if not self._stepped:
            return
        self._stepped = False
        self._take_loads()
        assert self._host_loads is not None
        names = list(self._moe_loads)
        on_host = dict(zip(names, self._host_loads.wait(), strict=True))
        self._move_biases()
        self._moe_loads = {}
        self._host_loads = None
        self._steps += 1
        decisions = [self._decide(layer, [on_host[name] for name in layer.moes]) for layer in self.layers]
        steps = self._agreed(decisions)
        for layer, decision, step in zip(self.layers, decisions, steps, strict=True):
            layer.adopt(decision.next_placement, self._optimizer_states)
            self._everywhere[layer.name] = step.next_placement
            self._keep_loads(step)
        # A forward since the optimizer's step has brought weights to where experts were then.
        self._stale = True
        finished = Step(self._steps, tuple(steps), self.meter.pop())
        for observe in self.observers:
            observe(finished)

    @property
    def _decides_now(self) -> bool:
        return self._steps % self.rebalancing.every_n_steps == 0

    def _take_loads(self) -> None:
        """Add up what the layers were asked to do, and start the sums on their way to the host."""
        new = {name: moe.pop_load() for layer in self.layers for name, moe in layer.moes.items()}
        if self._host_loads is not None and all(load is None for load in new.values()):
            return
        for layer in self.layers:
            for name, moe in layer.moes.items():
                load = new[name] or no_load(layer.cluster.num_ranks, moe.num_experts, layer.device)
                earlier = self._moe_loads.get(name)
                self._moe_loads[name] = load if earlier is None else earlier + load
        self._host_loads = HostLoads(list(self._moe_loads.values()))

    def _move_biases(self) -> None:
        for name, moe in self._balancing.items():
            moe.update_bias(self._moe_loads[name].by_expert)

    def _decide(self, layer: EngineLayer, loads: list[HostLoad]) -> LayerStep:
        load = loads[0]
        for other in loads[1:]:
            load = load + other
        chosen = layer.placement
        if self._decides_now:
            total = load.counts.sum(axis=0)
            if layer.name in self._loads:
                total = total + self._loads[layer.name][self._group.index]
            chosen = next_placement(self.rebalancing.policy, total, layer.cluster, layer.placement)
        moe = next(iter(layer.moes.values()))
        aux_loss = load.aux_loss / max(load.num_forwards, 1) if moe.knows_aux_loss else None
        return LayerStep(layer.name, load.counts, load.rank_load, aux_loss, layer.placement, chosen, moe.top_k)

    def _keep_loads(self, step: LayerStep) -> None:
        """For the next decision, of every group: a checkpoint keeps those of all."""
        earlier = self._loads.pop(step.name, 0)
        if not self._decides_now:
            by_group = step.counts.reshape(self._group.count, -1, step.counts.shape[1]).sum(axis=1)
            self._loads[step.name] = earlier + by_group

    def _agreed(self, steps: Sequence[LayerStep]) -> list[LayerStep]:
        """Before anything is sent: a group must have chosen the same placements.

        Losses become all ranks', and with several groups loads and placements too, so that all ranks hear of the same
        step: who watches a metric must decide alike everywhere.
        """
        if self._control is None:
            return list(steps)
        tables = b"".join(step.next_placement.table.tobytes() for step in steps)
        digest = int.from_bytes(hashlib.blake2b(tables, digest_size=6).digest(), "little")
        facts: list[NDArray[np.float64]] = []
        if self._group.count > 1:
            facts = [step.facts_of(self._control.rank % step.placement.num_ranks) for step in steps]
        mine = np.concatenate([[digest], [step.aux_loss or 0.0 for step in steps], *facts])
        everybody = self._control.gather_counts(torch.from_numpy(mine), "placement").numpy()
        self._check_agreement(everybody[:, 0].reshape(self._group.count, -1))
        losses = everybody[:, 1 : 1 + len(steps)].mean(axis=0).tolist()
        steps = [step.with_aux_loss(loss) for step, loss in zip(steps, losses, strict=True)]
        if self._group.count == 1:
            return steps
        ends = np.cumsum([part.size for part in facts])
        parts = np.split(everybody[:, 1 + len(steps) :], ends[:-1], axis=1)
        return [step.on_all_ranks(part, self._everywhere[step.name]) for step, part in zip(steps, parts, strict=True)]

    def _check_agreement(self, digests: NDArray[np.float64]) -> None:
        """``digests [G, N]`` must be equal in each group, which has seen the same loads."""
        for index, group in enumerate(digests):
            odd = np.flatnonzero(group != group[0])
            if not odd.size:
                continue
            first = index * group.size
            name = name_of(self.rebalancing.policy)
            raise RuntimeError(
                f"placement policy {name!r} chose other experts on rank(s) {(first + odd).tolist()} than on rank "
                f"{first} after step {self._steps}, from the same loads. A policy must be deterministic: no clock, no "
                "global random state, no set order"
            )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _first_everywhere(self, state: EngineState, layer: EngineLayer) -> Placement:
        """The placement of all ranks: every rank knows where the other groups start."""
        if self._group.count == 1:
            return layer.placement
        groups = (ExpertGroup(index, self._group.count) for index in range(self._group.count))
        tables = [state.first_placement(layer.name, layer.cluster, group).table for group in groups]
        return Placement(np.concatenate(tables), layer.cluster.num_experts)

    def state(self) -> EngineState:
        """For a checkpoint."""
        self.end_step()
        tables = {name: placement.table.tolist() for name, placement in self._everywhere.items()}
        loads = {name: np.asarray(counts).tolist() for name, counts in self._loads.items()}
        return EngineState(self._steps, tables, loads)


class GradientPhase:
    """Brings gradients of residents to the shards while the backward still runs.

    Layers start in one fixed order, the reverse of their forwards, whatever the order in which autograd reaches them:
    all ranks then issue the same collectives, also where a rank's loss does not reach a layer.

    Args:
        layers: in the order of their forwards.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._order = [layer for layer in reversed(layers) if not layer.hosted.computes_with_parameters]
        self._pending: dict[ExpertLayer, Pending[Locals]] = {}
        self._running = False
        self._unsynced = 0
        self.syncing = True
        for layer in self._order:
            layer.hosted.on_gradient = self._on_gradient
            layer.hosted.exchanges_next = partial(self._is_next, layer)

    def begin(self, loss: Tensor) -> None:
        """``end`` will run when the backward of ``loss`` is over, before anybody else sees gradients."""
        if self._order and loss.requires_grad:
            loss.register_hook(self._on_backward)

    def flush(self) -> None:
        """Exchange what backwards without ``syncing`` left: somebody looks, or the last one of them never came."""
        if not self._unsynced:
            return
        for layer in self._order:
            layer.hosted.leave_out_removed()
        self._exchange()

    def reset(self) -> None:
        """A step is over: gradients that were not exchanged are dropped."""
        self._unsynced = 0
        for layer in self._order:
            layer.hosted.drop_gradients()
            layer.hosted.forwards_since_step = 0
            layer.hosted.num_steps += 1

    def _on_backward(self, _: Tensor) -> None:
        if self._running:
            return
        self._running = True
        for layer in self._order:
            layer.hosted.begin_backward()
        Variable._execution_engine.queue_callback(self._end)

    def _on_gradient(self) -> None:
        self._on_backward(torch.empty(0))
        if self.syncing:
            self._start_ready()

    def _is_next(self, layer: ExpertLayer) -> bool:
        """Whether all gradients of ``layer``, given now, would be exchanged at once."""
        return self.syncing and self._turn() is layer and layer.hosted.forwards_since_backward == 1

    def _turn(self) -> ExpertLayer | None:
        """The next layer to exchange gradients."""
        waiting = (layer for layer in self._order if layer not in self._pending and layer.hosted.wants_exchange)
        return next(waiting, None)

    def _start_ready(self) -> None:
        """Start the layers whose turn it is and whose gradients are complete."""
        layer = self._turn()
        while layer is not None and layer.hosted.forwards_since_backward == 1 and layer.hosted.has_all_gradients:
            self._pending[layer] = layer.start_gradients()
            layer = self._turn()

    def _end(self) -> None:
        self._running = False
        if self.syncing:
            self._exchange()
            return
        self._unsynced += 1
        for layer in self._order:
            layer.hosted.hold_place(self.flush)

    def _exchange(self) -> None:
        self._unsynced = 0
        for layer in self._order:
            if layer not in self._pending and layer.hosted.wants_exchange:
                self._pending[layer] = layer.start_gradients()
        for layer, pending in self._pending.items():
            layer.hosted.add_gradients(pending.wait())
        self._pending = {}
        for layer in self._order:
            layer.hosted.forwards_since_backward = 0
