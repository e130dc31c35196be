"""A module's tensors as they are, to be put back when loading others fails half-way."""

from __future__ import annotations

from torch import Tensor, nn


class Snapshot:
    """A copy of all Parameters and buffers of ``module``, on the host. ``put_back`` makes them what they were.

    Args:
        module: with Parameters and buffers of its own; inside ``fit`` other objects may take their places.
    """

    def __init__(self, module: nn.Module) -> None:
        self._params = [
            (owner, name, param, _copy(param))
            for owner in module.modules()
            for name, param in owner.named_parameters(recurse=False)
        ]
        self._buffers = [
            (owner, name, _copy(buffer))
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]

    def put_back(self) -> None:
        """The same Parameters, with the values and types they had, on the host; gradients are gone.

        Nothing waits for a device, which may hang after an error.
        """
        for owner, name, param, value in self._params:
            param.grad = None
            param.data = value
            owner.register_parameter(name, param)
        for owner, name, value in self._buffers:
            setattr(owner, name, value)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)
