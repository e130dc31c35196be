"""Which way rows and expert state travel between ranks."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_swiftmoe.arguments import check_choice
from lightning_swiftmoe.parallel.communicator import Communicator

TRANSPORTS = ("auto", "gloo", "nccl", "symmetric")


def check_transport(transport: str) -> None:
    """Raise a ValueError for a transport that does not exist."""
    check_choice("transport", transport, TRANSPORTS)


def choose_transport(transport: str, device: torch.device, group: Communicator, everybody: Communicator) -> str:
    """``"gloo"``, ``"nccl"`` or ``"symmetric"``, the same on every rank. Collective.

    ``"auto"`` takes ``"symmetric"`` where the ranks of every expert group reach each other's memory, as those of one
    node may, else ``"nccl"`` on GPUs, else ``"gloo"``.

    Args:
        transport: what the user asked for.
        device: where this rank computes.
        group: the ranks of this rank's expert group, on their hosts.
        everybody: all ranks of the job, on their hosts.

    Raises:
        ValueError: what was asked for is not available; says what is.
    """
    best = _best(device, group, everybody)
    available = {"gloo": ("gloo",), "nccl": ("gloo", "nccl"), "symmetric": ("gloo", "nccl", "symmetric")}[best]
    if transport == "auto":
        return best
    if transport not in available:
        reason = {
            "gloo": "there is no NCCL process group of GPUs on every rank",
            "nccl": "ranks cannot reach each other's memory",
        }
        raise ValueError(f"transport={transport!r} is not available here: {reason[best]}; transport={best!r} works")
    return transport


def _best(device: torch.device, group: Communicator, everybody: Communicator) -> str:
    has_nccl = device.type == "cuda" and dist.get_backend() == "nccl"
    if everybody.largest(int(not has_nccl), "transport"):
        return "gloo"
    reaches = _reaches_all_peers(device, group)
    return "nccl" if everybody.largest(int(not reaches), "transport") else "symmetric"


def _reaches_all_peers(device: torch.device, group: Communicator) -> bool:
    """Whether every rank of the group has a GPU of its own on this host, with peer access to the others. Collective."""
    hosts, gpus = group.gather_counts(torch.tensor([_host_number(), device.index]), "transport").T.tolist()
    if len(set(hosts)) > 1 or len(set(gpus)) < group.num_ranks or not _has_symmetric_memory():
        return False
    others = [index for index in gpus if index != device.index]
    if any(index >= torch.cuda.device_count() for index in others):
        return False
    return all(torch.cuda.can_device_access_peer(device.index, other) for other in others)


def _host_number() -> int:
    """The same for ranks in one container of one machine only."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def _has_symmetric_memory() -> bool:
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError:
        return False
    return True
