"""Gated activation on a GPU: tiles of rows and columns, gate and up read once, all in fp32 registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.row_chunks import row_chunks, sum_chunks

COLUMNS, ROWS = 1024, 4
ROWS_OF_A_SUM = 64
"""Rows whose contributions to the scale's gradient one program sums."""


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activation(gate, SILU: tl.constexpr):
    """f(gate) and f'(gate)."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-gate))
        return gate * s, s * (1.0 + gate * (1.0 - s))
    else:
        square = tl.minimum(gate * gate, 900.0)  # beyond, t is 1 or -1
        t = _tanh(0.7978845608028654 * gate * (1.0 + 0.044715 * square))
        slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * square)
        return 0.5 * gate * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * gate * (1.0 - t * t) * slope


@triton.jit
def _forward(
    gate_up, scale, y, table, F, in_stride, y_stride,
    SILU: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    rows = start + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < stop)[:, None] & (columns < F)[None, :]
    at = gate_up + rows.to(tl.int64)[:, None] * in_stride + columns
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    value, _ = activation(gate, SILU)
    value *= up
    if SCALED:
        run = tl.load(table + 3 * chunk + 2).to(tl.int64)
        value *= tl.load(scale + run * F + columns, mask=columns < F, other=0.0)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * y_stride + columns, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy, gate_up, scale, dx, partials, table, F, dy_stride, in_stride, dx_stride,
    SILU: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    if SCALED:
        run = tl.load(table + 3 * chunk + 2).to(tl.int64)
        s = tl.load(scale + run * F + columns, mask=inside, other=0.0)[None, :]
        total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        row = rows.to(tl.int64)[:, None]
        mask = (rows < stop)[:, None] & inside[None, :]
        at = gate_up + row * in_stride + columns
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        value, slope = activation(gate, SILU)
        if SCALED:
            total += tl.sum(grad * value * up, axis=0)
            grad *= s
        out = dx + row * dx_stride + columns
        tl.store(out, (grad * up * slope).to(dx.dtype.element_ty), mask=mask)
        tl.store(out + F, (grad * value).to(dx.dtype.element_ty), mask=mask)
    if SCALED:
        tl.store(partials + chunk.to(tl.int64) * F + columns, total, mask=inside)


def forward(gate_up: Tensor, scale: Tensor | None, activation: str, runs: Sequence[int], spare: int) -> Tensor:
    """y [N, F] from gate_up [N, 2F]."""
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    y = with_spare(n, f, spare, gate_up)
    chunks = row_chunks((0, n) if scale is None else runs, ROWS, gate_up.device)
    block = min(COLUMNS, triton.next_power_of_2(f))
    if chunks.count:
        _forward[(chunks.count, triton.cdiv(f, block))](
            gate_up, y if scale is None else scale.contiguous(), y, chunks.table, f, gate_up.stride(0), y.stride(0),
            SILU=activation == "silu", SCALED=scale is not None, ROWS=ROWS, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, gate_up: Tensor, scale: Tensor | None, activation: str, runs: Sequence[int], spare: int
) -> tuple[Tensor, Tensor]:
    """Gradient of gate_up, and of the scale in fp32 (empty without one)."""
    n, f = dy.shape
    dx = with_spare(n, 2 * f, spare, gate_up)
    size = ROWS if scale is None else ROWS_OF_A_SUM
    chunks = row_chunks((0, n) if scale is None else runs, size, dy.device)
    partials = dy.new_empty(0 if scale is None else chunks.count, f, dtype=torch.float32)
    block = min(COLUMNS // 2, triton.next_power_of_2(f))
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    if chunks.count:
        _backward[(chunks.count, triton.cdiv(f, block))](
            dy, gate_up, dx if scale is None else scale.contiguous(), dx, partials, chunks.table, f,
            dy.stride(0), gate_up.stride(0), dx.stride(0),
            SILU=activation == "silu", SCALED=scale is not None, ROWS=ROWS, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return dx, partials.flatten() if scale is None else sum_chunks(partials, chunks)


_TYPES = {
    "dy": "*bf16", "gate_up": "*bf16", "scale": "*fp32", "dx": "*bf16", "y": "*bf16", "partials": "*fp32",
    "table": "*i32", "F": "i32", "dy_stride": "i32", "in_stride": "i32", "dx_stride": "i32", "y_stride": "i32",
}  # fmt: skip


def _case(name: str, kernel: object, arguments: str, block: int, silu: bool, scaled: bool) -> Compiled:
    return Compiled(
        name,
        kernel,
        {argument: _TYPES[argument] for argument in arguments.split()},
        {"SILU": silu, "SCALED": scaled, "ROWS": ROWS, "BLOCK": block},
        num_warps=8,
        limits=Limits(registers=128, shared=8192),
    )


_IN, _BACK = (
    "gate_up scale y table F in_stride y_stride",
    "dy gate_up scale dx partials table F dy_stride in_stride dx_stride",
)
COMPILED = [
    _case("glu, silu", _forward, _IN, COLUMNS, True, False),
    _case("glu, gelu with IA3", _forward, _IN, COLUMNS, False, True),
    _case("glu_backward, silu", _backward, _BACK, COLUMNS // 2, True, False),
    _case("glu_backward, gelu with IA3", _backward, _BACK, COLUMNS // 2, False, True),
]
