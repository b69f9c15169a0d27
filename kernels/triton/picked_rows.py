"""Gradient of rows picked by index on a GPU: a program sums all picks of one row, in the order of a stable sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits

PICKS, COLUMNS = 4, 512
"""Picks of a row that are added at a time, and columns of one program."""


@triton.jit
def _sum_picks(dy, order, first, dx, D, stride, PICKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    start, stop = tl.load(first + row), tl.load(first + row + 1)
    total = tl.zeros([PICKS, BLOCK], tl.float32)
    for begin in range(start, stop, PICKS):
        picks = begin + tl.arange(0, PICKS)
        here = picks < stop
        at = tl.load(order + picks, mask=here, other=0)[:, None] * stride + columns
        total += tl.load(dy + at, mask=here[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(dx + row * D + columns, tl.sum(total, axis=0).to(dx.dtype.element_ty), mask=inside)


def backward(dy: Tensor, index: Tensor, num_rows: int, trained: bool) -> Tensor:
    """dx [N, D] of dy [L, D]; zeros where a row was not picked. No table is made on the host, so it can be recorded."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = dy.new_empty(num_rows, dy.shape[1])
    if dx.numel() == 0:
        return dx
    ordered, order = torch.sort(index, stable=True)
    first = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=index.device))
    block = min(COLUMNS, triton.next_power_of_2(dy.shape[1]))
    _sum_picks[(num_rows, triton.cdiv(dy.shape[1], block))](
        dy, order, first, dx, dy.shape[1], dy.stride(0), PICKS=PICKS, BLOCK=block, num_warps=4
    )
    return dx


COMPILED = [
    Compiled(
        "picked_rows_backward",
        _sum_picks,
        {"dy": "*bf16", "order": "*i64", "first": "*i64", "dx": "*bf16", "D": "i32", "stride": "i32"},
        {"PICKS": PICKS, "BLOCK": COLUMNS},
        limits=Limits(registers=96, shared=8192),
    )
]
