"""Products with a 4-bit weight on a GPU, dequantised in registers tile by tile: y = x W^T + b and dx = dy W.

Each weight is rounded to the compute dtype as its dequantised form would be, so only the order of sums differs from
dequantising first. The weight is read once for every tile of rows of x, at a quarter of its bytes: it serves few rows.
codes: uint8 [out * in / 2]; absmax: fp32 [out * in / 64]; in must be even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import NARROW, Compiled, Limits

BLOCK_BYTES = tl.constexpr(32)
"""Bytes of codes that share one absolute maximum: 64 elements (Dettmers et al. 2023)."""
DEPTH = 64


@triton.jit
def _weights(codes, absmax, book, rows, inside, byte, row_bytes, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 [HEIGHT, WIDTH]: bytes `byte` [WIDTH / 2] of rows `rows` [HEIGHT]; `inside` [HEIGHT, WIDTH / 2]."""
    at = rows.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + at // BLOCK_BYTES, mask=inside, other=0.0)
    pair = tl.join(tl.load(book + (code >> 4)) * scale, tl.load(book + (code & 15)) * scale)
    return tl.reshape(pair, [HEIGHT, WIDTH])


@triton.jit
def _forward(
    x, codes, absmax, book, bias, y, num_rows, out, K, x_stride, y_stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here, there = rows < num_rows, columns < out
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k0 in range(0, K, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        byte = k0 // 2 + tl.arange(0, DEPTH // 2)
        at = x + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
        value = tl.load(at, mask=here[:, None] & (k < K)[None, :], other=0.0)
        inside = there[:, None] & (byte < K // 2)[None, :]
        w = _weights(codes, absmax, book, columns, inside, byte, K // 2, COLUMNS, DEPTH).to(value.dtype)
        total = tl.dot(value, w.T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=here[:, None] & there[None, :])


@triton.jit
def _backward(
    dy, codes, absmax, book, dx, num_rows, out, K, dy_stride, dx_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    byte = first // 2 + tl.arange(0, COLUMNS // 2)
    here = rows < num_rows
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j0 in range(0, out, DEPTH):
        j = j0 + tl.arange(0, DEPTH)
        at = dy + rows.to(tl.int64)[:, None] * dy_stride + j[None, :]
        grad = tl.load(at, mask=here[:, None] & (j < out)[None, :], other=0.0)
        inside = (j < out)[:, None] & (byte < K // 2)[None, :]
        w = _weights(codes, absmax, book, j, inside, byte, K // 2, DEPTH, COLUMNS).to(grad.dtype)
        total = tl.dot(grad, w, total, input_precision=PRECISION)
    columns = first + tl.arange(0, COLUMNS)
    target = dx + rows.to(tl.int64)[:, None] * dx_stride + columns[None, :]
    tl.store(target, total.to(dx.dtype.element_ty), mask=here[:, None] & (columns < K)[None, :])


def _book(device: torch.device) -> Tensor:
    from peftdyno.kernels.nf4 import codebook

    return codebook(device)


def _precision(x: Tensor) -> str:
    """float32 products in full; narrower types are exact in any case."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def forward(x: Tensor, codes: Tensor, absmax: Tensor, out: int, bias: Tensor | None, spare: int) -> Tensor:
    """y [N, out] with `spare` columns free to the right of each row."""
    n, k = x.shape
    tile = tuning.tile("nf4_linear", (n, k, out), x.device, x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = with_spare(n, out, spare, x)
    if n:
        _forward[(triton.cdiv(out, tile.columns), triton.cdiv(n, tile.rows))](
            x, codes, absmax, _book(x.device), absmax if bias is None else bias, y, n, out, k, x.stride(0), y.stride(0),
            BIAS=bias is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, PRECISION=_precision(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def backward(dy: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> Tensor:
    """dx [N, in]."""
    n, out = dy.shape
    tile = tuning.tile("nf4_linear_backward", (n, columns, out), dy.device, dy.dtype)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = dy.new_empty(n, columns)
    if n:
        _backward[(triton.cdiv(columns, tile.columns), triton.cdiv(n, tile.rows))](
            dy, codes, absmax, _book(dy.device), dx, n, out, columns, dy.stride(0), dx.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, PRECISION=_precision(dy),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx


def _types(names: str) -> dict[str, str]:
    known = {"codes": "*u8", "absmax": "*fp32", "book": "*fp32"} | dict.fromkeys(
        ("x", "y", "dx", "dy", "bias"), "*bf16"
    )
    return {name: known.get(name, "i32") for name in names.split()}


def _case(name: str, kernel: object, arguments: str, **options: object) -> Compiled:
    return Compiled(
        name.replace("_", " "),
        kernel,
        _types(arguments),
        {"DEPTH": DEPTH, "PRECISION": "tf32"} | options,
        limits=Limits(registers=255, matrix=NARROW),
        tile=name,
        sizes=("ROWS", "COLUMNS"),
    )


COMPILED = [
    _case("nf4_linear", _forward, "x codes absmax book bias y num_rows out K x_stride y_stride", BIAS=True),
    _case("nf4_linear_backward", _backward, "dy codes absmax book dx num_rows out K dy_stride dx_stride"),
]
