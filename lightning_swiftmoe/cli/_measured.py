"""What a rank measures of training steps, whoever trains: kept in a file, since ranks are other processes."""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

_TCP_INFO_BYTES, _RECEIVED_AT = 136, 128  # tcpi_bytes_received in struct tcp_info of <linux/tcp.h>


def write_whole(path: Path, value: Any, indent: int | None = None) -> None:
    """``value`` as JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=indent))
    part.rename(path)


@dataclass
class Measured:
    """Steps of one run, warm-up left out.

    Args:
        seconds: of each step, on rank 0.
        losses: mean over the ranks, in nats per token, of each step.
        survival: assignments processed per assignment routed, over all ranks and layers, of each step.
        received_bytes: through TCP per step, of each rank; empty where ranks do not talk through TCP.
        kernels: ms per step by name of GPU kernel.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    received_bytes: list[float] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=dict)

    def __add__(self, later: Measured) -> Measured:
        """Both runs' steps; of bytes and kernels, which are means already, those of the later run."""
        return Measured(
            self.seconds + later.seconds,
            self.losses + later.losses,
            self.survival + later.survival,
            later.received_bytes,
            later.kernels,
        )

    def write(self, path: Path) -> None:
        """As JSON, for ``read`` in another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Measured:
        """What ``write`` wrote."""
        return cls(**json.loads(path.read_text()))


def talks_through_tcp() -> bool:
    """Whether there are several ranks and all they exchange is seen by ``received_payload``."""
    return dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "gloo"


def received_payload() -> int:
    """Bytes that Linux handed to this process through its open TCP sockets: no headers, nothing sent twice."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            is_socket = entry.readlink().name.startswith("socket:")
        except FileNotFoundError:  # the one with which the folder is read
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(int(entry.name))) as tcp:
                if tcp.family in (socket.AF_INET, socket.AF_INET6) and tcp.type == socket.SOCK_STREAM:
                    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                    total += struct.unpack_from("Q", info, _RECEIVED_AT)[0]
    return total


def of_all_ranks(value: float) -> list[float]:
    """``value`` of every rank, in rank order. Collective, on gloo."""
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
