"""A barrier over the GPUs of one memory domain, and the exchange of counts that goes with it. One program each.

Every rank has a pad of int32 signals that all peers can write: `pad[channel, source]`. A rank that arrives writes the
epoch into its own place on every peer's pad, then waits until every source on its own pad has reached that epoch.
Signals only grow, so nothing is ever reset, and a peer may already be one epoch ahead.

The releasing write is cumulative: what this rank wrote before it, in this kernel or in earlier ones of its stream, is
visible to whoever acquires the signal. Inside the kernel, block barriers tie the other threads' writes to it.

Shape legend: N ranks in a vector of LANES, E experts.
"""

import triton
import triton.language as tl


@triton.jit
def _arrive(pads, epochs, rank, channel, N, LANES: tl.constexpr):
    """Tell every peer that this rank has come to the next epoch."""
    source = tl.arange(0, LANES)
    there = source < N
    epoch = tl.load(epochs + channel) + 1
    pad = tl.load(pads + source, mask=there, other=0).to(tl.pointer_type(tl.int32))
    arrived = tl.zeros([LANES], tl.int32) + epoch
    tl.debug_barrier()
    tl.atomic_xchg(pad + channel * N + rank, arrived, mask=there, sem="release", scope="sys")


@triton.jit
def _wait(pads, epochs, rank, channel, N, LANES: tl.constexpr):
    """Wait until every peer has come to the next epoch, which begins."""
    source = tl.arange(0, LANES)
    there = source < N
    epoch = tl.load(epochs + channel) + 1
    own = tl.load(pads + rank).to(tl.pointer_type(tl.int32)) + channel * N + source
    nothing = tl.zeros([LANES], tl.int32)
    # A difference, not an order: epochs wrap around after two to the 31.
    behind = LANES
    while behind > 0:
        seen = tl.atomic_add(own, nothing, mask=there, sem="acquire", scope="sys")
        behind = tl.sum((there & (seen - epoch < 0)).to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(epochs + channel, epoch)


@triton.jit(do_not_specialize=["rank", "channel"])
def arrive_kernel(pads, epochs, rank, channel, N, LANES: tl.constexpr):
    """The first half of a barrier: this rank's work so far is done."""
    _arrive(pads, epochs, rank, channel, N, LANES)


@triton.jit(do_not_specialize=["rank", "channel"])
def wait_kernel(pads, epochs, rank, channel, N, LANES: tl.constexpr):
    """The second half: that of all N ranks is."""
    _wait(pads, epochs, rank, channel, N, LANES)


@triton.jit(do_not_specialize=["rank", "channel"])
def barrier_kernel(pads, epochs, rank, channel, N, LANES: tl.constexpr):
    """Wait until all N ranks have come here."""
    _arrive(pads, epochs, rank, channel, N, LANES)
    _wait(pads, epochs, rank, channel, N, LANES)


@triton.jit(do_not_specialize=["rank", "channel"])
def exchange_counts_kernel(
    counts, peer_counts, pads, epochs, rank, channel, N, E, LANES: tl.constexpr, BINS: tl.constexpr
):
    """Row `rank` of every peer's `counts[N, E]` becomes these counts; then a barrier."""
    expert = tl.arange(0, BINS)
    inside = expert < E
    count = tl.load(counts + expert, mask=inside, other=0).to(tl.int64)
    for peer in range(0, N):
        target = tl.load(peer_counts + peer).to(tl.pointer_type(tl.int64)) + rank * E + expert
        tl.store(target, count, mask=inside)
    _arrive(pads, epochs, rank, channel, N, LANES)
    _wait(pads, epochs, rank, channel, N, LANES)
