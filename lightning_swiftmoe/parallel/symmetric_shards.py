"""Expert state through memory that all ranks reach: owners write into residents and read gradients where they stand.

Shape suffixes: N ranks, E experts, R residents of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.peer_shards import Residents, pull_shards, push_shards
from lightning_swiftmoe.parallel.communicator import Communicator, Pending
from lightning_swiftmoe.parallel.peer_memory import Channel, PeerMemory, SharedTensor
from lightning_swiftmoe.parallel.shard_exchange import Cuts, Locals, ShardExchange
from lightning_swiftmoe.placement import Placement

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class SymmetricState:
    """Makes the exchanges of all layers of a rank; a ``ShardExchangeFactory``.

    Args:
        memory: of the ranks.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._buffers = GradientBuffers(memory)

    def __call__(self, communicator: Communicator, name: str, cuts: Cuts, num_sharers: int) -> ShardExchange:
        """See ``ShardExchangeFactory``."""
        return SymmetricShards(communicator, self._memory, self._buffers, name, cuts, num_sharers)


class GradientBuffers:
    """Where gradients of residents wait to be fetched: two buffers for all layers of the same shapes, used in turn.

    Args:
        memory: of the ranks.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._buffers: dict[tuple[Shapes, torch.dtype, int], GradientBuffer] = {}
        self._num_layers = 0

    def turn(self) -> int:
        """Which of the two the next layer uses; layers come in the same order on every rank."""
        self._num_layers += 1
        return self._num_layers % 2

    def of(self, shapes: Shapes, dtype: torch.dtype, turn: int) -> GradientBuffer:
        """Collective the first time."""
        key = shapes, dtype, turn
        if key not in self._buffers:
            tensors = {name: self._memory.empty(shape, dtype) for name, shape in shapes}
            self._memory.synchronize()
            self._buffers[key] = GradientBuffer(tensors)
        return self._buffers[key]


class GradientBuffer:
    """Room for the gradients of one layer.

    Args:
        tensors: ``[>= R, rows, cols]`` by parameter.
    """

    def __init__(self, tensors: dict[str, SharedTensor]) -> None:
        self.tensors = tensors
        self._fetched: torch.cuda.Event | None = None

    def fetched(self) -> None:
        """The current stream has seen that all owners have what they want."""
        self._fetched = torch.cuda.Event()
        self._fetched.record()

    def wait(self) -> None:
        """Let the current stream write here once they do."""
        if self._fetched is not None:
            torch.cuda.current_stream().wait_event(self._fetched)


class SymmetricShards(ShardExchange):
    """One kernel a parameter each way, between barriers on the device.

    Args:
        communicator: for expert state: its stream, and what times and watches.
        memory: of the same ranks.
        buffers: for gradients of all layers.
        name: of the layer.
        cuts: who owns what of each parameter.
        num_sharers: ranks that the mean of gradients is over.
    """

    def __init__(
        self,
        communicator: Communicator,
        memory: PeerMemory,
        buffers: GradientBuffers,
        name: str,
        cuts: Cuts,
        num_sharers: int,
    ) -> None:
        self._communicator = communicator
        self._memory = memory
        self._buffers = buffers
        self._turn = buffers.turn()
        self._name = name
        self._cuts = cuts
        self._num_sharers = num_sharers
        self._residents: dict[str, SharedTensor] = {}
        self._known_places: tuple[Placement, Residents] | None = None

    def make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``ShardExchange``. Collective."""
        shared = self._memory.empty(shape, dtype)
        shared.local.zero_()
        self._residents[key] = shared
        return shared.local

    def start_weights(self, shards: Locals, residents: Locals, placement: Placement) -> Pending[None]:
        """See ``ShardExchange``."""
        places = self._places(placement)
        rank = self._communicator.rank
        copies = int(placement.num_residents.sum() - placement.num_residents[rank])

        @torch.no_grad()
        def push() -> None:
            # Nobody computes with the weights of the last step any more.
            self._memory.barrier(Channel.STATE)
            for key, shared in self._residents.items():
                cut = self._cuts[key]
                start = cut.bounds[rank]
                push_shards(shards[key].flatten(1), places, shared.peers, cut.bounds[-1], start, shared.local.dtype)
            self._memory.barrier(Channel.STATE)

        for key, shared in self._residents.items():
            sent = copies * self._cuts[key].size(rank)
            self._communicator.meter.add("weight", sent * shared.local.element_size())
        return self._communicator.launch(push, "weight", self._name)

    def start_gradients(self, grads: Locals, shards: Locals, placement: Placement) -> Pending[Locals]:
        """See ``ShardExchange``."""
        places = self._places(placement)
        rank = self._communicator.rank
        mine = placement.residents(rank).size
        buffer = self._buffer(grads)

        @torch.no_grad()
        def pull() -> Locals:
            for key, grad in grads.items():
                here = buffer.tensors[key].local
                if grad.data_ptr() != here.data_ptr():
                    here[:mine].copy_(grad[:mine])
            self._memory.barrier(Channel.STATE)
            totals = {}
            for key, grad in grads.items():
                cut = self._cuts[key]
                total = torch.empty_like(shards[key])
                pull_shards(
                    total.view(total.shape[0], -1),
                    places,
                    buffer.tensors[key].peers,
                    cut.bounds[-1],
                    cut.bounds[rank],
                    grad.dtype,
                    1 / self._num_sharers,
                )
                totals[key] = total
            self._memory.barrier(Channel.STATE)
            buffer.fetched()
            return totals

        for key, grad in grads.items():
            cut = self._cuts[key]
            sent = mine * (cut.bounds[-1] - cut.size(rank))
            self._communicator.meter.add("gradient", sent * grad.element_size())
        return self._communicator.launch(pull, "gradient", self._name, holding=grads)

    def gradient_memory(self, residents: Locals) -> Locals | None:
        """See ``ShardExchange``."""
        buffer = self._buffer(residents)
        buffer.wait()
        return {key: shared.local for key, shared in buffer.tensors.items()}

    def _buffer(self, like: Locals) -> GradientBuffer:
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in like.items())
        return self._buffers.of(shapes, next(iter(like.values())).dtype, self._turn)

    def _places(self, placement: Placement) -> Residents:
        if self._known_places is None or not self._known_places[0].same_residents(placement):
            experts = [placement.residents(rank).tolist() for rank in range(self._communicator.num_ranks)]
            places = Residents.of(experts, placement.num_experts)
            self._known_places = placement, places.to(self._communicator.device)
        return self._known_places[1]
