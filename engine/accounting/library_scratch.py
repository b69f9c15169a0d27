"""Scratch of the CPU's matrix library, measured on this machine one product shape at a time.

In bf16 the library repacks operands into memory of PyTorch's allocator; how much depends on shapes, layout, processor
and threads, and no formula is published. The product is run once on unset values to see.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from peftdyno.kernels import memory

MATMULS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""aten operator -> place of its first matrix among the arguments."""


def product_scratch(first: Tensor, second: Tensor) -> int:
    """Bytes that the product of two matrices holds for a moment; the tensors may be on the meta device.

    0 for types that the library multiplies in place, and where nothing can be recorded.
    """
    if first.dtype not in (torch.bfloat16, torch.float16) or not memory.available():
        return 0
    return _measured(_layout(first), _layout(second), first.dtype, torch.get_num_threads())


def _layout(matrix: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(matrix.shape), matrix.stride()


@lru_cache(maxsize=4096)
def _measured(
    first: tuple[tuple[int, ...], tuple[int, ...]],
    second: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    threads: int,
) -> int:
    a, b = (torch.empty_strided(shape, strides, dtype=dtype).zero_() for shape, strides in (first, second))
    torch.matmul(a, b)
    with memory.AllocatorPeak() as recorded:
        product = torch.matmul(a, b)
    return recorded.peak_bytes - product.untyped_storage().nbytes()
