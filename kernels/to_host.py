"""Values that the host must know, without keeping other threads from the device while they are on their way."""

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """The same values on the host; waits for the device.

    The copy goes to pinned memory. One to pageable memory (``cpu()``, ``tolist()``) keeps a lock of CUDA's driver until
    it is over: other threads may ask an event, and not even record one, so none of them saves what is held.
    """
    if not tensor.is_cuda:
        return tensor
    pinned = tensor.to("cpu", non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned
