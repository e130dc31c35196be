"""Launching a Triton kernel again without choosing its compiled form anew, which takes longer than a small kernel runs.

Shape-free: a `Launcher` knows arguments only by what Triton specialises a kernel on.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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


def _kind(argument: Any, specialized: bool = True) -> Any:
    """What a compiled kernel depends on: of an integer whether it is 1, a multiple of 16 or wide; of a pointer its
    type and alignment. Of an integer that is not specialized, only whether it is wide."""
    if isinstance(argument, int):
        wide = argument >= 2**31
        return (argument == 1, argument % 16 == 0, wide) if specialized else wide
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, Box):
        return argument.base.dtype, argument.block
    return argument


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
        device = next(a for a in args if isinstance(a, Tensor)).device
        key = (device, num_warps, *constants.values(), *map(_kind, args, self._specialized))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args, *constants.values())
            return
        described = [a.descriptor() if isinstance(a, Box) else a for a in args]
        names = list(self._kernel.arg_names)[len(args) :]
        assert names == list(constants), f"constants must come as {names}, got {list(constants)}"
        # None in the interpreter, which compiles nothing.
        compiled = self._kernel[grid](*described, **constants, num_warps=num_warps)
        if compiled is not None:
            self._compiled[key] = compiled
