"""``.grad`` of expert Parameters between the micro-batches of an accumulation, where nothing has been exchanged yet.

A rank has no gradient to show then: its own tokens' is neither a mean over ranks nor cut as the Parameter is. So what
stands in ``.grad`` waits. Whoever looks at it, or changes it, has the exchange made first, by all ranks, and finds the
sum so far, as in one process; where nobody looks it costs nothing. As any look at expert tensors it is collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_swiftmoe.parallel.expert_tensor import FACTS, ExpertTensor


class _Waiting:
    """What both kinds of tensors do; attribute ``_exchange`` refers to what makes the sum complete."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, _Waiting):
                tensor.look()
        # Nothing in it waits any more.
        return func(*args, **kwargs)

    def look(self) -> None:
        """From now on a tensor like any other, with all that there is to be seen."""
        exchange = self._exchange()  # type: ignore[attr-defined]
        if exchange is not None:
            exchange()
        settle(self)  # type: ignore[arg-type]


class WaitingTensor(_Waiting, Tensor):
    """Of a Parameter that is whole on this rank."""


class WaitingExpertTensor(_Waiting, ExpertTensor):
    """Of a Parameter that is spread over ranks. torch's functions come by ``_Waiting``; these do not."""

    def to_local(self, **kwargs: Any) -> Tensor:
        """See ``DTensor``."""
        self.look()
        return self.to_local(**kwargs)

    def full_tensor(self, **kwargs: Any) -> Tensor:
        """See ``ExpertTensor``."""
        self.look()
        return self.full_tensor(**kwargs)

    def redistribute(self, *args: Any, **kwargs: Any) -> Any:
        """See ``DTensor``."""
        self.look()
        return self.redistribute(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        self.look()
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.look()
        return self.__deepcopy__(memo)


def wait(tensor: Tensor, exchange: Callable[[], None]) -> None:
    """Let ``tensor`` wait until somebody looks: the same object, which others may hold already.

    Args:
        tensor: a gradient, with what was exchanged before or zeros.
        exchange: a bound method that adds what is missing, and settles it. Its object is not kept alive.
    """
    tensor.__class__ = WaitingExpertTensor if isinstance(tensor, ExpertTensor) else WaitingTensor
    tensor._exchange = WeakMethod(exchange)  # type: ignore[attr-defined]


def settle(tensor: Tensor) -> None:
    """``tensor`` is complete: nobody has to be asked any more."""
    if isinstance(tensor, _Waiting):
        del tensor._exchange  # type: ignore[attr-defined]
        tensor.__class__ = ExpertTensor if isinstance(tensor, ExpertTensor) else Tensor  # type: ignore[assignment]
