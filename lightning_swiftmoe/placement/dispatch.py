"""Which tokens go to which rank: the plan of the dispatch and combine exchanges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_swiftmoe.placement.placement import IntArray, Placement


@dataclass(frozen=True)
class DispatchPlan:
    """One rank's part of a dispatch, in assignments. Every rank derives its own from the same global counts.

    Args:
        send: ``[N, E]`` how many of this rank's kept assignments of expert ``e`` go to rank ``j``.
        recv: ``[N, E]`` how many assignments of expert ``e`` arrive from rank ``j``.
        rank_load: ``[N]`` assignments that every rank processes.
    """

    send: IntArray
    recv: IntArray
    rank_load: IntArray


def plan_dispatch(kept: IntArray, hosted: IntArray, rank: int) -> DispatchPlan:
    """Bring every expert's kept assignments to its hosts, on the rank they come from where possible.

    Within its share a rank serves itself first (**ours**: those tokens never travel); the remaining sources and the
    remaining shares are matched in rank order.

    Args:
        kept: ``[N, E]`` assignments that each rank keeps.
        hosted: ``[N, E]`` assignments that each rank processes, as many of each expert.
        rank: whose plan.
    """
    local = np.minimum(kept, hosted)
    source_end = np.cumsum(kept - local, axis=0)
    host_end = np.cumsum(hosted - local, axis=0)
    source_start = source_end - (kept - local)
    host_start = host_end - (hosted - local)
    send = _overlap(source_start[rank], source_end[rank], host_start, host_end)
    recv = _overlap(host_start[rank], host_end[rank], source_start, source_end)
    send[rank] += local[rank]
    recv[rank] += local[rank]
    return DispatchPlan(send, recv, hosted.sum(axis=1))


def host_share(load: IntArray, placement: Placement) -> IntArray:
    """``[N, E]`` assignments each rank processes when ``load[e]`` are spread evenly over the replicas of ``e``.

    A host with ``m`` of the ``r`` replicas takes ``m/r``, whoever routed them, so the load of a rank does not depend on
    where tokens start.

    Example: 10 assignments over replicas on ranks 0, 0 and 1 give 6 and 4 (cumulative rounding down).
    """
    upper = np.cumsum(placement.multiplicity, axis=0) * load // placement.replicas
    return np.diff(upper, axis=0, prepend=0)


def _overlap(start: IntArray, end: IntArray, starts: IntArray, ends: IntArray) -> IntArray:
    return np.maximum(np.minimum(end, ends) - np.maximum(start, starts), 0)
