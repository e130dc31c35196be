"""Which implementation runs."""

from torch import Tensor

from lightning_swiftmoe.kernels.dispatch import has_triton, interpreted


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton runs on this tensor's device; plain torch does otherwise."""
    return has_triton() and (tensor.device.type == "cuda" or interpreted())
