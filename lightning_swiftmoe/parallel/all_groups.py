"""What expert groups tell each other in a forward: how much each expert drew."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_swiftmoe.parallel.communicator import Communicator


class CountsOfAllGroups:
    """Adds up a layer's counts over expert groups, so that losses and biases are those of one process.

    ``E`` integers a forward. The router is dense and the same on all ranks: with the counts of its group alone it would
    learn another loss, and its biases of loss-free balancing would drift apart.

    Args:
        replicas: one rank of each expert group, of which this is one.
        num_processes: ranks of the job.
        name: of the layer, for error messages.
    """

    def __init__(self, replicas: Communicator, num_processes: int, name: str) -> None:
        self.replicas = replicas
        self.num_processes = num_processes
        self.name = name

    @torch.compiler.disable  # communicates
    def add_up(self, counts: Tensor) -> Tensor:
        """``[E]`` assignments routed by all ranks of the job, from the ``counts [N, E]`` of this rank's group."""
        return self.replicas.add_up(counts.sum(dim=0), "load", self.name)
