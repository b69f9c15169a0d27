"""Scales and shifts of output columns by run on a GPU, and their gradients as sums over each run's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.row_chunks import row_chunks, sum_chunks

ROWS, COLUMNS = 4, 512
ROWS_OF_A_SUM = 64


@triton.jit
def _affine(y, values, table, width, stride, MULTIPLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2).to(tl.int64)
    rows = start + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < stop)[:, None] & (columns < width)[None, :]
    v = tl.load(values + run * width + columns, mask=columns < width, other=0.0)[None, :]
    at = y + rows.to(tl.int64)[:, None] * stride + columns
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = value * v if MULTIPLY else value + v
    tl.store(at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    dy, before, partials, table, width, dy_stride, before_stride,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None]
        mask = (rows < stop)[:, None] & (columns < width)[None, :]
        value = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if PRODUCT:
            value *= tl.load(before + row * before_stride + columns, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value, axis=0)
    tl.store(partials + chunk.to(tl.int64) * width + columns, total, mask=columns < width)


def _apply(y: Tensor, values: Tensor, column: int, run_offsets: Sequence[int], multiply: bool) -> None:
    width = values.shape[1]
    assert y.stride(1) == 1, y.stride()
    chunks = row_chunks(run_offsets, ROWS, y.device)
    block = min(COLUMNS, triton.next_power_of_2(width))
    if chunks.count:
        _affine[(chunks.count, triton.cdiv(width, block))](
            y[:, column:], values.contiguous(), chunks.table, width, y.stride(0),
            MULTIPLY=multiply, ROWS=ROWS, BLOCK=block, num_warps=4,
        )  # fmt: skip


def scale(y: Tensor, scale: Tensor, column: int, run_offsets: Sequence[int]) -> None:
    """In place on the columns of y."""
    _apply(y, scale, column, run_offsets, True)


def shift(y: Tensor, shift: Tensor, column: int, run_offsets: Sequence[int]) -> None:
    """In place on the columns of y."""
    _apply(y, shift, column, run_offsets, False)


def column_sums(dy: Tensor, before: Tensor | None, column: int, width: int, run_offsets: Sequence[int]) -> Tensor:
    """[R, width] sums in fp32 of dy (times `before` where given) over each run's tokens."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    chunks = row_chunks(run_offsets, ROWS_OF_A_SUM, dy.device)
    partials = dy.new_empty(chunks.count, width, dtype=torch.float32)
    block = min(COLUMNS, triton.next_power_of_2(width))
    factor = dy if before is None else before
    if chunks.count:
        _sums[(chunks.count, triton.cdiv(width, block))](
            dy[:, column:], factor, partials, chunks.table, width, dy.stride(0), factor.stride(0),
            PRODUCT=before is not None, ROWS=ROWS, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return sum_chunks(partials, chunks)


COMPILED = [
    Compiled(
        "bank_scale_",
        _affine,
        {"y": "*bf16", "values": "*fp32", "table": "*i32", "width": "i32", "stride": "i32"},
        {"MULTIPLY": True, "ROWS": ROWS, "BLOCK": COLUMNS},
        limits=Limits(registers=64, shared=2048),
    ),
    Compiled(
        "bank_column_sums",
        _sums,
        {
            "dy": "*bf16", "before": "*bf16", "partials": "*fp32", "table": "*i32", "width": "i32",
            "dy_stride": "i32", "before_stride": "i32",
        },
        {"PRODUCT": True, "ROWS": ROWS, "BLOCK": COLUMNS},
        limits=Limits(registers=96, shared=8192),
    ),
]  # fmt: skip
