"""Ranks in network namespaces of their own, as if on hosts of their own: bytes can be counted, links limited.

Linux only, as root (CAP_NET_ADMIN), with ``ip`` and ``tc`` of iproute2. Everything is made inside a namespace of a
child process and ends with it: nothing is left behind, and nobody else's network is touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import subprocess
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A small bucket, since a full one goes out at full speed; a long queue, since switches and NICs lose nothing either.
_BURST, _QUEUE = "16kb", "1000ms"
_CONTEXT = multiprocessing.get_context("fork")


def enter_own_network() -> None:
    """Move this process to a new network with nothing but a loopback device.

    Raises:
        OSError: the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newnet, set_flags, up_and_running = 0x40000000, 0x8914, 0x41
    if libc.unshare(clone_newnet) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, set_flags, struct.pack("16sh14x", b"lo", up_and_running))


def sent_bytes(device: str) -> int:
    """Bytes that left through a device of this process's network, headers included."""
    counters = Path("/proc/self/net/dev").read_text().split(f"{device}:")[1].split()
    return int(counters[8])


def why_not() -> str | None:
    """Why ranks cannot have networks of their own here; None where they can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the program {program!r} is missing: install iproute2"
    try:
        _in_child(_try_devices)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        return f"no network namespaces here ({reason}): run on Linux as root"
    return None


def run_on_links(num_ranks: int, rate_mbit: float | None, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``fn(rank, *args)`` on every rank; results in rank order.

    A rank sees its own host: a device ``eth0`` with address ``address(rank)``, joined to the others by a bridge.

    Args:
        num_ranks: at most 250.
        rate_mbit: limit of each link in 10^6 bit/s, for either direction; None leaves it as fast as the machine.
        fn: what to run, in a forked process.
        *args: for ``fn``.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
    """
    return _in_child(_join_and_run, num_ranks, rate_mbit, fn, args)


def address(rank: int) -> str:
    """Where a rank is reached from the others."""
    return f"10.0.0.{rank + 1}"


def _join_and_run(num_ranks: int, rate_mbit: float | None, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    enter_own_network()
    _run("ip link add bridge type bridge")
    _run("ip link set bridge up")
    pipes, workers = [], []
    for rank in range(num_ranks):
        ours, theirs = _CONTEXT.Pipe()
        worker = _CONTEXT.Process(target=_host, args=(theirs, rank, rate_mbit, fn, args), daemon=True)
        worker.start()
        theirs.close()  # else a rank that dies is never noticed
        pipes.append(ours)
        workers.append(worker)
    for rank, (pipe, worker) in enumerate(zip(pipes, workers, strict=True)):
        _result(pipe)
        _run(f"ip link add port{rank} type veth peer name eth0 netns {worker.pid}")
        _run(f"ip link set port{rank} master bridge up")
        _limit(f"port{rank}", rate_mbit)
        pipe.send("linked")
    for pipe in pipes:
        _result(pipe)
    for pipe in pipes:
        pipe.send("all linked")
    return [_result(pipe) for pipe in pipes]


def _host(connection: Connection, rank: int, rate_mbit: float | None, fn: Callable[..., Any], args: Any) -> None:
    def work() -> Any:
        enter_own_network()
        connection.send((True, None))
        connection.recv()
        _run(f"ip address add {address(rank)}/24 dev eth0")
        _run("ip link set eth0 up")
        _limit("eth0", rate_mbit)
        connection.send((True, None))
        connection.recv()
        # Libraries warn of hosts without names; what matters comes back as an exception.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        return fn(rank, *args)

    _report(connection, work)


def _limit(device: str, rate_mbit: float | None) -> None:
    """Limits what leaves through a device; each link is limited at both of its ends, so in both directions."""
    if rate_mbit is not None:
        _run(f"tc qdisc add dev {device} root tbf rate {rate_mbit:g}mbit burst {_BURST} latency {_QUEUE}")


def _try_devices() -> None:
    enter_own_network()
    _run("ip link add port type veth peer name eth0")
    _limit("port", 100)
    _run("ip link add bridge type bridge")


def _in_child(fn: Callable[..., Any], *args: Any) -> Any:
    ours, theirs = _CONTEXT.Pipe()
    child = _CONTEXT.Process(target=_report, args=(theirs, lambda: fn(*args)))
    child.start()
    theirs.close()
    try:
        return _result(ours)
    finally:
        child.kill()
        child.join()


def _report(connection: Connection, work: Callable[[], Any]) -> None:
    """Sends what ``work`` returns or raises. Ends when its parent does, so that no rank is left behind."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    try:
        connection.send((True, work()))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    os._exit(0)  # threads of collectives may still wait for other ranks


def _result(connection: Connection) -> Any:
    try:
        ok, value = connection.recv()
    except EOFError:
        raise RuntimeError("a rank died without a word; was it short of memory?") from None
    if not ok:
        raise RuntimeError(value)
    return value


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")
