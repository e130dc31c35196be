"""``python -m tests.semantics.peers.launched SYSTEM ROW``: a fit whose two ranks Lightning itself starts.

What a rank that fails says, and who ends, is the launcher's business; other rows bring ranks of their own.
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from tests.semantics.peers.systems import SYSTEMS, Batches, Model, make_trainer


class Raises(Model):
    """On rank 1, in the third step."""

    def train_dataloader(self):
        """Each rank's own part."""
        return Batches(5, self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch, batch_idx):
        """Fails on one rank."""
        if batch_idx == 2 and self.trainer.global_rank == 1:
            self.fail()
        return super().training_step(batch, batch_idx)

    def fail(self):
        """As a mistake in the user's code."""
        raise ValueError("the first cause")


class Dies(Raises):
    """As the kernel does when memory runs out."""

    def fail(self):
        """Nothing else runs."""
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # DeepSpeed asks for this one.
    os.environ["DS_ACCELERATOR"] = "cpu"
    system = SYSTEMS[sys.argv[1]]
    module = {"raises": Raises, "dies": Dies}[sys.argv[2]]
    make_trainer(system, max_steps=5, devices=2).fit(module(system))
