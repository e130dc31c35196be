"""Dense gradients are added up in the same order in every step, the first one included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def fix_bucket_order(ddp: DistributedDataParallel) -> None:
    """Let DDP make its buckets before the first step. Collective: as many bytes as one step.

    DDP sums its first backward's gradients in a single bucket, and makes the buckets of all later ones from the order
    in which they came. The place of an element decides in which order three or more ranks add it up. So without this
    the first step after a checkpoint would not be, to the last bit, the step that an uninterrupted run takes there.

    The first backward is therefore one of zeros, from the last Parameter to the first. Nothing is left of it.

    Args:
        ddp: just made. One that finds unused Parameters has its buckets already; a static graph, DDP's own mixed
            precision and sparse gradients take the first backward for more than an order: they are left alone.
    """
    if ddp.find_unused_parameters or ddp.static_graph or ddp.mixed_precision is not None or _sparse(ddp):
        return
    params = [
        param
        for name, param in ddp.module.named_parameters()
        if param.requires_grad and name not in ddp.parameters_to_ignore
    ]
    with _unheard(params):
        ddp.reducer.prepare_for_backward([])
        sums = [param.sum() for param in params]
        torch.autograd.backward(sums, [torch.zeros_like(total) for total in sums])
    # Lightning drops gradients anyway when training starts; their memory is free now.
    for param in params:
        param.grad = None


@contextmanager
def _unheard(params: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hooks of Parameters hear nothing of gradients inside."""
    hooks = [h for param in params for h in (param._backward_hooks, param._post_accumulate_grad_hooks) if h]
    kept = [dict(h) for h in hooks]
    for of_param in hooks:
        of_param.clear()
    yield
    for of_param, theirs in zip(hooks, kept, strict=True):
        of_param.update(theirs)


def _sparse(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse for part in module.modules())
