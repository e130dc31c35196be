"""What a launcher takes for the same compiled kernel."""

from types import SimpleNamespace
from typing import Any

import torch

from lightning_swiftmoe.kernels.launch import Launcher


class FakeKernel:
    """Stands for a `triton.jit` function; remembers for which arguments it compiled."""

    arg_names = ("tensor", "width", "count")

    def __init__(self) -> None:
        self.compiled_for: list[tuple[int, int]] = []
        self.launches = 0
        self.params = [
            SimpleNamespace(do_not_specialize=False),
            SimpleNamespace(do_not_specialize=False),
            SimpleNamespace(do_not_specialize=True),
        ]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(tensor: torch.Tensor, width: int, count: int, num_warps: int) -> Any:
            self.compiled_for.append((width, count))
            return {grid: self.launch}

        return compile_and_launch

    def launch(self, *args: Any) -> None:
        self.launches += 1


def test_counts_that_are_not_specialized_share_a_kernel() -> None:
    kernel = FakeKernel()
    launcher = Launcher(kernel)
    for count in (1, 16, 17, 5, 2**31 - 1):
        launcher((1, 1, 1), torch.zeros(4), 64, count)
    assert kernel.compiled_for == [(64, 1)]
    assert kernel.launches == 4
    launcher((1, 1, 1), torch.zeros(4), 64, 2**31)
    assert kernel.compiled_for == [(64, 1), (64, 2**31)], "a wide integer is another type"


def test_other_integers_are_told_apart() -> None:
    kernel = FakeKernel()
    launcher = Launcher(kernel)
    for width in (1, 16, 32, 17, 5, 2**31, 2**31 + 1):
        launcher((1, 1, 1), torch.zeros(4), width, 3)
    assert [width for width, _ in kernel.compiled_for] == [1, 16, 17, 2**31, 2**31 + 1]
