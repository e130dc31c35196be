"""Launching a Triton kernel again without choosing its compiled form anew, which takes longer than a small kernel runs.

Shape-free: a `Launcher` knows arguments only by what Triton specialises a kernel on. What is here runs at every launch:
Triton's own `cdiv` takes 2 us, a key of thirteen arguments 3 us.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, 1 for less than 1."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(slots=True)
class Box:
    """A tensor map for TMA: a contiguous 2-D tensor on a 16-byte boundary and the block that one copy moves.

    Stands for Gluon's `TensorDescriptor`, whose checks cost more than the rest of a launch.
    """

    base: Tensor
    shape: list[int]
    strides: list[int]
    block: tuple[int, int]
    padding: str = "zero"  # Triton's launcher reads these two off a descriptor
    round_f32_to_tf32: bool = False

    def descriptor(self) -> Any:
        """The same as Triton's own class, which compilation asks for."""
        import torch
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        dtype = gl.bfloat16 if self.base.dtype == torch.bfloat16 else gl.float16
        layout = gl.NVMMASharedLayout.get_default_for(list(self.block), dtype)
        return TensorDescriptor(self.base, self.shape, self.strides, list(self.block), layout)


def box(tensor: Tensor, block: tuple[int, int]) -> Box:
    """The tensor map of a 2-D tensor."""
    return Box(tensor, list(tensor.shape), list(tensor.stride()), block)


@dataclass(frozen=True)
class Launch:
    """A launch that was asked for and not made."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    num_warps: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.__name__

    def described(self) -> list[Any]:
        """The arguments as Triton takes them."""
        return [a.descriptor() if isinstance(a, Box) else a for a in self.args]


_MOST_INT32 = 2**31 - 1


class _Recorder(threading.local):
    launches: list[Launch] | None = None


_recorder = _Recorder()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of this thread go into the list that the context gives, and are not made; for set-up only."""
    earlier, _recorder.launches = _recorder.launches, []
    try:
        yield _recorder.launches
    finally:
        _recorder.launches = earlier


def is_recording() -> bool:
    """Whether launches of this thread are noted and not made."""
    return _recorder.launches is not None


class Launcher:
    """A kernel whose compile-time arguments come last in its signature."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}
        # The interpreter's kernels have no parameters to ask: they compile nothing.
        self._specialized = [not parameter.do_not_specialize for parameter in getattr(kernel, "params", ())]

    def __call__(self, grid: tuple[int, int, int], *args: Any, num_warps: int = 4, **constants: Any) -> None:
        """Launch on the current device and stream.

        Args:
            grid: programs in x, y and z.
            args: integers, tensors, `Box`es or None, in the order of the kernel's signature.
            num_warps: warps of a program.
            constants: the kernel's compile-time arguments, in the order of its signature.
        """
        if _recorder.launches is not None:
            _recorder.launches.append(Launch(self._kernel, grid, args, num_warps, constants))
            return
        known = self._compiled.get(self.key(args, num_warps, constants))
        if known is not None:
            _run(known, grid, args, constants)
            return
        described = [a.descriptor() if isinstance(a, Box) else a for a in args]
        # None in the interpreter, which compiles nothing.
        compiled = self._kernel[grid](*described, **constants, num_warps=num_warps)
        names = list(self._kernel.arg_names)[len(args) :]
        assert names == list(constants), f"constants must come as {names}, got {list(constants)}"
        if compiled is not None:
            self._compiled[self.key(args, num_warps, constants)] = compiled

    def key(self, args: tuple[Any, ...], num_warps: int, constants: dict[str, Any]) -> tuple[Any, ...]:
        """All that the compiled form depends on.

        Of an integer that is whether it is 1, a multiple of 16 or wide, and only the last where it is not specialized;
        of a pointer its type and alignment; and the device, the same for all.
        """
        parts = [num_warps, *constants.values()]
        add = parts.append
        device = None
        for argument, specialized in zip(args, self._specialized, strict=False):
            kind = type(argument)
            if kind is int:
                add(argument > _MOST_INT32)
                if specialized:
                    add(16 if argument & 15 == 0 else argument == 1)
            elif kind is Box:
                add(argument.base.dtype)
                add(argument.block)
            elif kind is Tensor or isinstance(argument, Tensor):
                add(argument.dtype)
                add(argument.data_ptr() & 15 == 0)
                device = argument if device is None else device
            else:
                add(argument)
        add(None if device is None else device.get_device())
        return tuple(parts)


@functools.cache
def _triton() -> tuple[Any, Any]:
    """What holds the hooks around launches, and what holds the driver. Triton exists for Linux only."""
    from triton import knobs
    from triton.runtime import driver

    return knobs.runtime, driver


def _run(compiled: Any, grid: tuple[int, int, int], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """`compiled[grid](...)` without the closure, the metadata and the calls that only a profiler's hooks are for."""
    runtime, drivers = _triton()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    if hooked or not hasattr(compiled, "packed_metadata"):
        compiled[grid](*args, *constants.values())
        return
    driver = drivers.active
    stream = driver.get_current_stream(driver.get_current_device())
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants.values()
    )
