"""Addresses in device memory: written here, read by the kernels that find their tensors by them."""

import torch
import triton
import triton.language as tl

# What an address may point to.
ELEMENT = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def pointer_from(address, ELEMENT: tl.constexpr):
    """The pointer to ELEMENTs at an address, or at each of several, on 16-byte boundaries."""
    # Nothing is known of a loaded address: without the promise every element is a transaction of its own.
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def pointer_of(tensor, INDIRECT: tl.constexpr, ELEMENT: tl.constexpr):
    """The pointer itself, or the one to ELEMENTs in the cell that it points to."""
    if INDIRECT:
        pointer = pointer_from(tl.load(tensor), ELEMENT)
    else:
        pointer = tensor
    return pointer


@triton.jit
def _copy(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit(do_not_specialize=["address_0", "address_1", "address_2", "address_3", "size_0", "size_1", "size_2"])
def point_kernel(
    cells, address_0, address_1, address_2, address_3, source_0, target_0, size_0, source_1, target_1, size_1,
    source_2, target_2, size_2, NUM_TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`cells[i]` becomes address i, and every target its source, which may be None."""
    if tl.program_id(0) == 0:
        if NUM_TENSORS > 0:
            tl.store(cells, address_0.to(tl.int64))
        if NUM_TENSORS > 1:
            tl.store(cells + 1, address_1.to(tl.int64))
        if NUM_TENSORS > 2:
            tl.store(cells + 2, address_2.to(tl.int64))
        if NUM_TENSORS > 3:
            tl.store(cells + 3, address_3.to(tl.int64))
    if source_0 is not None:
        _copy(source_0, target_0, size_0, BLOCK)
    if source_1 is not None:
        _copy(source_1, target_1, size_1, BLOCK)
    if source_2 is not None:
        _copy(source_2, target_2, size_2, BLOCK)
