"""RMS norm on a GPU: a tile of whole rows a program, each row read once.

The weight's gradient is summed over the rows of a chunk in registers, then over a run's chunks (see `row_chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.row_chunks import row_chunks, sum_chunks

TILE = 4096
"""Elements of a tile: rows are taken together until they fill it."""
ROWS_OF_A_SUM = 32
"""Rows whose contributions to the weight's gradient one program sums."""


@triton.jit
def _forward(
    x, residual, weight, y, h, rstd, table, num_rows, D, x_stride, residual_stride, y_stride, eps, offset,
    ADD: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    if RUNS:
        start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
        weight += tl.load(table + 3 * chunk + 2).to(tl.int64) * D
    else:
        start, stop = chunk * ROWS, num_rows
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    row = rows.to(tl.int64)[:, None]
    mask = (rows < stop)[:, None] & (columns < D)[None, :]
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        more = tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(h + row * D + columns, value, mask=mask)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + eps)
    tl.store(rstd + rows, scale, mask=rows < stop)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    normed = wide * scale[:, None] * w[None, :]
    tl.store(y + row * y_stride + columns, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy, dh, h, weight, rstd, dx, partials, table, num_rows, D, dy_stride, dh_stride, h_stride, offset,
    ADD: tl.constexpr, RUNS: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    if RUNS:
        start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
        weight += tl.load(table + 3 * chunk + 2).to(tl.int64) * D
    else:
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, num_rows)
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32) + offset
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None]
        mask = (rows < stop)[:, None] & (columns < D)[None, :]
        scale = tl.load(rstd + rows, mask=rows < stop, other=0.0)[:, None]
        normed = tl.load(h + row * h_stride + columns, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        g = grad * w[None, :]
        value = scale * (g - normed * (tl.sum(g * normed, axis=1) / D)[:, None])
        if ADD:
            value += tl.load(dh + row * dh_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * D + columns, value.to(dx.dtype.element_ty), mask=mask)
        if SUM:
            total += tl.sum(grad * normed, axis=0)
    if SUM:
        tl.store(partials + chunk.to(tl.int64) * D + columns, total, mask=columns < D)


def _tile(columns: int) -> tuple[int, int, int]:
    """Columns padded to a power of two, rows of a tile, warps."""
    block = triton.next_power_of_2(columns)
    rows = max(1, min(32, TILE // block))
    return block, rows, max(1, min(16, block * rows // 512))


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    run_offsets: Sequence[int],
    eps: float,
    offset: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (empty without a residual) and rstd [N]."""
    n, d = x.shape
    x = _rows(x)
    y, rstd = with_spare(n, d, spare, x), x.new_empty(n, dtype=torch.float32)
    h = x.new_empty(0) if residual is None else x.new_empty(n, d)
    block, rows, warps = _tile(d)
    runs = weight.dim() == 2
    chunks = row_chunks(run_offsets if runs else (0, n), rows, x.device)
    if chunks.count:
        more = x if residual is None else _rows(residual)
        _forward[(chunks.count,)](
            x, more, weight.contiguous(), y, h, rstd, chunks.table, n, d,
            x.stride(0), more.stride(0), y.stride(0), eps, offset,
            ADD=residual is not None, RUNS=runs, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, h, rstd


def backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    run_offsets: Sequence[int],
    offset: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of h, and of the weight in fp32 (empty unless needed)."""
    n, d = h.shape
    dy, h = _rows(dy), _rows(h)
    dx = h.new_empty(n, d)
    block, rows, warps = _tile(d)
    runs = weight.dim() == 2
    size = max(rows, ROWS_OF_A_SUM) if need_weight else rows
    chunks = row_chunks(run_offsets if runs else (0, n), size, h.device)
    partials = dx.new_empty(chunks.count if need_weight else 0, d, dtype=torch.float32)
    if chunks.count:
        more = dy if dh is None else _rows(dh)
        _backward[(chunks.count,)](
            dy, more, h, weight.contiguous(), rstd, dx, partials, chunks.table, n, d,
            dy.stride(0), more.stride(0), h.stride(0), offset,
            ADD=dh is not None, RUNS=runs, SUM=need_weight, ROWS=rows, CHUNK=size, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    if not need_weight:
        return dx, partials.flatten()
    return dx, sum_chunks(partials, chunks).view(weight.shape)


_FORWARD_TYPES = {
    "x": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16", "h": "*bf16", "rstd": "*fp32",
    "table": "*i32", "num_rows": "i32", "D": "i32", "x_stride": "i32", "residual_stride": "i32",
    "y_stride": "i32", "eps": "fp32", "offset": "fp32",
}  # fmt: skip
_BACKWARD_TYPES = {
    "dy": "*bf16", "dh": "*bf16", "h": "*bf16", "weight": "*fp32", "rstd": "*fp32", "dx": "*bf16",
    "partials": "*fp32", "table": "*i32", "num_rows": "i32", "D": "i32", "dy_stride": "i32",
    "dh_stride": "i32", "h_stride": "i32", "offset": "fp32",
}  # fmt: skip
COMPILED = [
    Compiled(
        "rms_norm",
        _forward,
        _FORWARD_TYPES,
        {"ADD": True, "RUNS": False, "ROWS": 1, "BLOCK": 4096},
        num_warps=8,
        limits=Limits(registers=96, shared=1024),
    ),
    Compiled(
        "rms_norm_backward",
        _backward,
        _BACKWARD_TYPES,
        {"ADD": True, "RUNS": True, "SUM": True, "ROWS": 1, "CHUNK": 32, "BLOCK": 4096},
        num_warps=8,
        limits=Limits(registers=128, shared=8192),
    ),
    Compiled(
        "rms_norm_backward, heads",
        _backward,
        _BACKWARD_TYPES | {"weight": "*bf16"},
        {"ADD": False, "RUNS": False, "SUM": False, "ROWS": 32, "CHUNK": 32, "BLOCK": 128},
        num_warps=8,
        limits=Limits(registers=128, shared=1024),
    ),
]
