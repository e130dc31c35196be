"""Expert state through memory that all ranks reach: owners write into residents and read gradients where they stand.

Shape suffixes: N ranks, E experts, R residents of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.indirect import MOST_TENSORS, point, pointed
from lightning_swiftmoe.kernels.shards.peer_shards import Residents, pull_shards, push_shards
from lightning_swiftmoe.parallel.communicator import Communicator, Pending
from lightning_swiftmoe.parallel.cuda_graphs import GraphedSections, GraphMemory, identity
from lightning_swiftmoe.parallel.peer_memory import Channel, PeerMemory, SharedTensor
from lightning_swiftmoe.parallel.shard_exchange import Cuts, Locals, ShardExchange
from lightning_swiftmoe.parallel.symmetric_copies import OfferedGradients, SymmetricCopies
from lightning_swiftmoe.placement import Placement

Kinds = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # names, shapes and dtypes of tensors


class SymmetricState:
    """Makes the exchanges of all layers of a rank; a ``ShardExchangeFactory``.

    Args:
        memory: of the ranks.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._buffers = GradientBuffers(memory)
        self._offered = OfferedGradients(memory)
        # One for all layers: these graphs give nothing. Rows have others, which run beside them.
        self._graphs: GraphMemory | None = None
        if memory.device.type == "cuda":
            self._graphs = GraphMemory(memory.device, torch.cuda.Stream(memory.device))

    def __call__(self, communicator: Communicator, name: str, cuts: Cuts, num_sharers: int) -> ShardExchange:
        """See ``ShardExchangeFactory``."""
        sections = GraphedSections(self._graphs)
        return SymmetricShards(
            communicator, self._memory, self._buffers, self._offered, sections, name, cuts, num_sharers
        )


class GradientBuffers:
    """Where gradients of residents wait to be fetched: two buffers for all layers of the same kinds, used in turn.

    Args:
        memory: of the ranks.
    """

    def __init__(self, memory: PeerMemory) -> None:
        self._memory = memory
        self._buffers: dict[tuple[Kinds, int], GradientBuffer] = {}
        self._num_layers = 0

    def turn(self) -> int:
        """Which of the two the next layer uses; layers come in the same order on every rank."""
        self._num_layers += 1
        return self._num_layers % 2

    def of(self, kinds: Kinds, turn: int) -> GradientBuffer:
        """Collective the first time."""
        key = kinds, turn
        if key not in self._buffers:
            tensors = {name: self._memory.empty(shape, dtype) for name, shape, dtype in kinds}
            self._memory.synchronize()
            self._buffers[key] = GradientBuffer(self._memory, tensors)
        return self._buffers[key]


class GradientBuffer:
    """Room for the gradients of one layer.

    Args:
        memory: of the ranks.
        tensors: ``[>= R, rows, ...]`` by parameter.
    """

    def __init__(self, memory: PeerMemory, tensors: dict[str, SharedTensor]) -> None:
        self.tensors = tensors
        self._memory = memory
        self._fetched: torch.cuda.Event | None = None

    def fetched(self) -> None:
        """The current stream has seen that all owners have what they want."""
        self._fetched = self._memory.mark()

    def wait(self) -> None:
        """Let the current stream write here once they do."""
        if self._fetched is not None:
            self._memory.wait_for(self._fetched)


class SymmetricShards(ShardExchange):
    """One kernel a parameter each way, between barriers on the device.

    Args:
        communicator: for expert state: its stream, and what times and watches.
        memory: of the same ranks.
        buffers: for gradients of all layers.
        offered: room for those of copies, of all layers.
        sections: of this layer; they run on the communicator's stream.
        name: of the layer.
        cuts: who owns what of each parameter.
        num_sharers: ranks that the mean of gradients is over.
    """

    def __init__(
        self,
        communicator: Communicator,
        memory: PeerMemory,
        buffers: GradientBuffers,
        offered: OfferedGradients,
        sections: GraphedSections,
        name: str,
        cuts: Cuts,
        num_sharers: int,
    ) -> None:
        self._communicator = communicator
        self._memory = memory
        self._buffers = buffers
        self._turn = buffers.turn()
        self._offered = offered
        self._sections = sections
        self._name = name
        self._cuts = cuts
        self._num_sharers = num_sharers
        self._residents: dict[str, SharedTensor] = {}
        self._placed: tuple[Placement, Tensor] | None = None
        self._cells = torch.empty(MOST_TENSORS, dtype=torch.int64, device=communicator.device)

    def make_resident(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``ShardExchange``. Collective."""
        shared = self._memory.empty(shape, dtype)
        shared.local.zero_()
        self._residents[key] = shared
        return shared.local

    def make_copies(self, most: int, up_name: str) -> SymmetricCopies | None:
        """See ``ShardExchange``."""
        residents = [self._residents[key] for key in (up_name, "down_proj")]
        offered = [self._offered.like(number, shared.local, most) for number, shared in enumerate(residents)]
        return SymmetricCopies(residents, offered)

    def start_weights(self, shards: Locals, residents: Locals, placement: Placement) -> Pending[None]:
        """See ``ShardExchange``."""
        rank = self._communicator.rank
        copies = int(placement.num_residents.sum() - placement.num_residents[rank])

        @torch.no_grad()
        def push() -> None:
            memory = self._places(placement)

            def write() -> None:
                places = Residents.within(memory, placement.num_experts)
                # Nobody computes with the weights of the last step any more.
                self._memory.barrier(Channel.STATE)
                for key, shared in self._residents.items():
                    cut = self._cuts[key]
                    start = cut.bounds[rank]
                    push_shards(shards[key].flatten(1), places, shared.peers, cut.bounds[-1], start, shared.local.dtype)
                self._memory.barrier(Channel.STATE)

            residents = [shared.local for shared in self._residents.values()]
            self._sections.run("weights", identity(memory, *shards.values(), *residents), write)

        for key, shared in self._residents.items():
            sent = copies * self._cuts[key].size(rank)
            self._communicator.meter.add("weight", sent * shared.local.element_size())
        return self._communicator.launch(push, "weight", self._name)

    def start_gradients(self, grads: Locals, shards: Locals, placement: Placement) -> Pending[Locals]:
        """See ``ShardExchange``."""
        rank = self._communicator.rank
        mine = placement.residents(rank).size
        buffer = self._buffer(grads)

        @torch.no_grad()
        def pull() -> Locals:
            for key, grad in grads.items():
                here = buffer.tensors[key].local
                if grad.data_ptr() != here.data_ptr():
                    here[:mine].copy_(grad[:mine])
            memory = self._places(placement)
            totals = {key: torch.empty_like(shards[key]) for key in grads}
            flat = [total.view(total.shape[0], -1) for total in totals.values()]
            point(self._cells, flat)

            def fetch() -> None:
                places = Residents.within(memory, placement.num_experts)
                self._memory.barrier(Channel.STATE)
                for key, total in zip(grads, pointed(self._cells, flat), strict=True):
                    cut, shared = self._cuts[key], buffer.tensors[key]
                    start, scale = cut.bounds[rank], 1 / self._num_sharers
                    pull_shards(total, places, shared.peers, cut.bounds[-1], start, shared.local.dtype, scale)
                self._memory.barrier(Channel.STATE)

            where = identity(memory, self._cells, *(buffer.tensors[key].local for key in grads))
            self._sections.run("gradients", (tuple(grads), where), fetch)
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
        kinds = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in like.items())
        return self._buffers.of(kinds, self._turn)

    def _places(self, placement: Placement) -> Tensor:
        """``Residents`` in memory that stays the same, on the stream of the exchanges."""
        num_experts, ranks = placement.num_experts, range(self._communicator.num_ranks)
        room = len(ranks) * min(placement.slots_per_rank, num_experts)
        if self._placed is None:
            memory = torch.empty(num_experts + 1 + 2 * room, dtype=torch.int32, device=self._communicator.device)
        else:
            known, memory = self._placed
            if known.same_residents(placement):
                return memory
        experts = [placement.residents(rank).tolist() for rank in ranks]
        packed = Residents.of(experts, num_experts).pack(room)
        memory.copy_(packed.pin_memory() if memory.device.type == "cuda" else packed, non_blocking=True)
        self._placed = placement, memory
        return memory
