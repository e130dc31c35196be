"""The ``symmetric`` transport between CPU ranks: kernels in Triton's interpreter, peers' memory in mapped files.

Plans, barriers that spin, rows and shards that are written into other processes: all that is real. A rank does one
thing after another, so what orders one stream of a GPU after another is not tried. Run as a module in a process of its
own: the interpreter's switch is read on import.
"""

import os
import random
import sys
import tempfile
import time
from dataclasses import replace

# Ranks are forked from this process, and a forked OpenMP pool hangs. A number set by hand would not do: where the
# variable is missing, launching sets another.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist

from lightning_swiftmoe.kernels.token_dispatch.move import peer_addresses
from lightning_swiftmoe.parallel import setup
from lightning_swiftmoe.parallel.peer_memory import PeerMemory, SharedTensor
from lightning_swiftmoe.parallel.row_exchange import PlacementTables, TokenBound
from lightning_swiftmoe.parallel.symmetric_rows import SymmetricRows
from lightning_swiftmoe.parallel.symmetric_shards import SymmetricState
from tests.gpu.cases import Checkpointed
from tests.jobs import InEvalMode, Job, Net, largest_error, sgd, train, train_alone
from tests.ranks import run_ranks

CPU = torch.device("cpu")
PATIENCE_S = 0.05  # longer than a rank takes from one barrier to the next


class FileMemory(PeerMemory):
    """Shared tensors are files that all ranks map, and at every barrier one rank falls behind.

    No other may mind: it cannot need what that rank has not done, nor spoil what that rank still reads.
    """

    def __init__(self, group, control, folder):
        super().__init__(group, CPU, control)
        self._folder = folder
        self._num_tensors = 0
        self._random = random.Random(0)  # the same on every rank
        self._late_rank = 0
        self._arrivals = 0
        self._waits = self.empty((1,), torch.int64)
        self._waits.local.zero_()
        self.synchronize()

    def empty(self, shape, dtype):
        self._num_tensors += 1
        names = [f"{self._folder}/{self._num_tensors}-{rank}" for rank in range(self.num_ranks)]
        local = mapped(names[self.rank], shape, dtype)
        # Promised are undefined values: nobody may rely on a new file's zeros.
        local.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
        self.synchronize()
        peers = [local if rank == self.rank else mapped(name, shape, dtype) for rank, name in enumerate(names)]
        return SharedTensor(local, peer_addresses([peer.data_ptr() for peer in peers], CPU), peers)

    def synchronize(self):
        dist.barrier(self._control.group)

    def mark(self):
        return None

    def barrier(self, channel):
        self._waits.local.add_(1)
        super().barrier(channel)
        self._passed()

    def exchange_counts(self, counts, all_counts):
        self._waits.local.add_(1)
        super().exchange_counts(counts, all_counts)
        self._passed()

    def arrive(self, channel):
        super().arrive(channel)
        self._arrivals += 1
        self._fall_behind()

    def wait(self, channel):
        self._waits.local.add_(1)
        super().wait(channel)

    def _passed(self):
        self._arrivals += 1
        self._late_rank = self._random.randrange(self.num_ranks)
        self._fall_behind()

    def _fall_behind(self):
        """Go on when the others wait for this rank: at their next barrier, or else somewhere outside."""
        if self._late_rank != self.rank:
            return
        others = [waits for rank, waits in enumerate(self._waits.handle) if rank != self.rank]
        deadline = time.monotonic() + PATIENCE_S
        while any(waits <= self._arrivals for waits in others) and time.monotonic() < deadline:
            os.sched_yield()


class SameEverywhere(TokenBound):
    """All ranks have as many tokens. Agreeing on it would be a barrier that kernels on GPUs do not wait for."""

    def of(self, num_assignments, name):
        self._most = max(self._most, num_assignments)
        return self._most


def mapped(name, shape, dtype):
    return torch.from_file(name, shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def train_through_files(job, folder):
    memories = []

    def exchanges(transport, tokens, control, bound):
        memory = FileMemory(tokens.group, control, folder)
        memories.append(memory)
        return SymmetricRows(tokens, memory, SameEverywhere(control)), SymmetricState(memory)

    setup._device_exchanges = exchanges
    weights = train(job)
    assert all(epoch > 0 for epoch in memories[0].signals.epochs), "something took another way"
    return weights


class Twice(Net):
    """Each layer runs twice before the first of its backwards, whose gradients differ."""

    def forward(self, x):
        x = self.inp(x)
        for moe in self.moes:
            x = x + moe(torch.tanh(x)) - moe(torch.sin(x)) / 2
        return self.out(x)


class Compiled:
    """One graph, without a break, with the strategy and without."""

    def __init__(self, job):
        super().__init__(job)
        self.compiled = torch.compile(super().loss, backend="aot_eager", fullgraph=True)

    def loss(self, batch):
        return self.compiled(batch)


class CompiledTwice(Compiled, Twice):
    pass


class CompiledFrozenTwice(CompiledTwice):
    """MoE layers are frozen and in eval mode, as a pretrained part often is; what is dense trains through them."""

    def __init__(self, job):
        super().__init__(job)
        self.moes.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        self.moes.eval()


class CompiledInEvalMode(Compiled, InEvalMode):
    pass


class CompiledExperts(Compiled, Net):
    """Nothing in front of the first experts wants a gradient, but they do."""

    def __init__(self, job):
        super().__init__(job)
        self.inp.requires_grad_(False)
        for moe in self.moes:
            moe.router.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=0.1)


class Growing(Net):
    """Every step has more tokens than the last."""

    def loss(self, batch):
        stride = self.job.steps - self.global_step
        return super().loss([part[::stride] for part in batch])


class SelfTaught(Net):
    """Targets lean on predictions: forwards that keep nothing for a backward stand between those that do."""

    def loss(self, batch):
        x, y = batch
        self.eval()
        with torch.no_grad():
            predicted = self(x).squeeze(-1)
        self.train()
        return super().loss((x, y + predicted / 2))


class HalfFrozen(Net):
    """Gradients of the up projection, for which tokens travel once more, are not wanted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for moe in self.moes:
            getattr(moe.experts, moe.experts.up_name).requires_grad_(False)


class EditsBeforeBackward(Checkpointed):
    """Experts change between a forward and the backward that repeats it."""

    def on_before_backward(self, loss):
        with torch.no_grad():
            for moe in self.moes:
                for param in moe.experts.parameters():
                    param.mul_(0.5)


CASES = {
    "plain": {},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}},
    "swiglu_every_loss": {"moe": {"activation": "swiglu", "aux_loss_coef": 0.1, "z_loss_coef": 0.01}},
    "checkpointed": {"module": Checkpointed},
    "twice": {"module": Twice},
    "growing": {"module": Growing},
    "compiled_twice": {"module": CompiledTwice},
    "compiled_experts": {"module": CompiledExperts},
    "compiled_frozen_twice": {"module": CompiledFrozenTwice},
    "self_taught": {"module": SelfTaught},
    "in_eval_mode": {"module": InEvalMode},
    "compiled_in_eval_mode": {"module": CompiledInEvalMode},
    "half_frozen": {"module": HalfFrozen},
    "edits_before_backward": {"module": EditsBeforeBackward},
}


def job_of(num_ranks, case):
    """With ``copies`` in front of its name no expert has two hosts, and ranks borrow.

    With ``spilling`` pre-activations of the first tile of rows alone are kept.
    """
    # SGD, because a wrong scale of gradients leaves Adam's steps as they are.
    job = Job(precision="32-true", optimizer=sgd, steps=2, batch=12, slots=-(-5 // num_ranks) + 1)
    if case.startswith("copies_"):
        strategy = {"split": "exact", "transient_copies": 1 if num_ranks == 2 else 2}
        job = replace(job, num_experts=2 * num_ranks, slots=2, strategy=strategy)
    return replace(job, **CASES[case.removeprefix("copies_").removeprefix("spilling_")])


def one_tile(tables, num_assignments, tile):
    return tile


def check(num_ranks, case):
    job = job_of(num_ranks, case)
    expected = train_alone(job)
    usual_rows = PlacementTables.usual_rows
    if case.startswith("spilling_"):
        PlacementTables.usual_rows = one_tile
    with tempfile.TemporaryDirectory() as folder:
        results = run_ranks(num_ranks, train_through_files, job, folder)
    for weights in results:
        assert largest_error(weights, expected) < 1e-5
        assert all(torch.equal(weights[key], results[0][key]) for key in weights)
    PlacementTables.usual_rows = usual_rows


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(name, flush=True)
        check(int(sys.argv[1]), name)
