"""Leaving process groups without the other ranks.

Destroying an NCCL group waits until every rank destroys it, and a kernel of one waits on the device for ranks that may
be gone. A rank that failed would do neither any good: it aborts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group


def abort_nccl(groups: Sequence[dist.ProcessGroup]) -> None:
    """End what runs in those of ``groups`` that are NCCL's, and let go of the peers."""
    ours = [group for group in groups if dist.get_backend(group) == "nccl"]
    if not ours:
        return
    # As one, as torch's own abort of everything does: one by one they can wait for each other.
    first: Any = ours[0]._get_backend(torch.device("cuda"))
    first._group_start()
    for group in ours:
        group.abort()
    first._group_end()


def abort_all() -> None:
    """Every group of this process, the default one too: when it ends."""
    if dist.is_initialized():
        _abort_process_group()
