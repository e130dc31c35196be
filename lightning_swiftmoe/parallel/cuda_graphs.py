"""Kernels over memory that stands still, launched as one CUDA graph.

Launching a small kernel takes the host longer than the device runs it. A ``GraphedSection`` is asked for the same work
again and again; once it has seen that nothing about it changes, it records the launches and from then on replays them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_swiftmoe.kernels.launch import is_recording

T = TypeVar("T")


class GraphMemory:
    """What some graphs of one device share: temporary memory, and the stream they are recorded on.

    They are replayed one at a time, on one stream. What a graph gives stands in this memory too: a graph that was
    recorded before it may have temporaries in the same place. So only graphs that are replayed in the order in which
    they were recorded, or of which none gives anything that another's replay may meet, share memory.

    Args:
        device: where they run.
        stream: to record on; one for all memories of an owner, as torch has few.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = stream
        # The pool ends with its last graph, and does not come back: this one stays.
        self._first, _ = self.record(lambda: torch.zeros(1, device=device))

    def record(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """What ``work`` launches on the current stream, as a graph, and its result, which only a replay computes."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Other threads, such as watchdogs, go on asking for their events.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        return graph, result


class GraphedSection:
    """Runs work eagerly the first time, records it the second and replays it from then on.

    Args:
        memory: shared with other sections.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self._memory = memory
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Any = None

    def knows(self, key: Hashable) -> bool:
        """Whether it will not start anew with this key."""
        return key == self._key

    def run(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """The result of ``work``. That of a replay is the same memory every time.

        Args:
            key: all that the launches of ``work`` depend on: addresses, shapes, options. With another key than last
                time the section starts anew.
            work: launches kernels on the current stream; waits for nothing, and decides nothing on what they compute.
        """
        if is_recording():
            return work()
        if not self.knows(key):
            self._key = key
            self._graph = self._result = None
            return work()
        if self._graph is None:
            self._graph, self._result = self._memory.record(work)
        self._graph.replay()
        return self._result


class GraphedSections:
    """Sections by name.

    Args:
        memory: that they share; None where there are no graphs: all work is done at once.
    """

    def __init__(self, memory: GraphMemory | None) -> None:
        self._memory = memory
        self._sections: dict[str, GraphedSection] = {}

    def run(self, name: str, key: Hashable, work: Callable[[], T], feeds: Sequence[str] = ()) -> T:
        """See ``GraphedSection``.

        Args:
            name: which section.
            key: all that its launches depend on.
            work: of the section.
            feeds: sections that read what this one gives: they start anew with it.
        """
        if self._memory is None:
            return work()
        if name not in self._sections:
            self._sections[name] = GraphedSection(self._memory)
        if not self._sections[name].knows(key):
            for other in feeds:
                self._sections.pop(other, None)
        result: T = self._sections[name].run(key, work)
        return result


def identity(*tensors: Tensor) -> Hashable:
    """What a recorded launch knows of tensors: where they are and how they are laid out."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
