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
from peftdyno.kernels.triton.nf4 import BLOCK_BYTES, levels

DEPTH = 64
PROGRAMS, TURNS = 4, 8
"""Programs wanted for each multiprocessor, and the fewest turns of DEPTH columns that are worth one. A program has two
turns of codes on their way, 4 KB; a multiprocessor needs about 23 KB for its share of an H200's bandwidth (4.3 TB/s x
0.7 us / 132)."""
SUM_BLOCK = 512


@triton.jit
def _weights(
    codes, absmax, book, rows, there, first, row_bytes,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """fp32 [HEIGHT, WIDTH] from byte `first` of rows `rows` [HEIGHT] on, those that are `there`. WHOLE: rows begin with
    a block, so that a tile as wide as one has one scale a row."""
    start = rows.to(tl.int64) * row_bytes + first
    byte = tl.arange(0, WIDTH // 2)
    inside = there[:, None] & (first + byte < row_bytes)[None, :]
    code = tl.load(codes + start[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
    if WHOLE and WIDTH // 2 <= BLOCK_BYTES:
        scale = tl.load(absmax + start // BLOCK_BYTES, mask=there, other=0.0)[:, None]
    else:
        element = tl.arange(0, WIDTH)
        at = start[:, None] + (element // 2)[None, :]
        inside = there[:, None] & (first + element // 2 < row_bytes)[None, :]
        scale = tl.load(absmax + at // BLOCK_BYTES, mask=inside, other=0.0)
    return levels(code, book, HEIGHT, WIDTH) * scale


@triton.jit
def _forward(
    x, codes, absmax, book, bias, y, num_rows, out, K, turns, x_stride, y_stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here, there = rows < num_rows, columns < out
    total, book = tl.zeros([ROWS, COLUMNS], tl.float32), tl.load(book + tl.arange(0, 16))
    part = tl.program_id(2)
    y += part.to(tl.int64) * num_rows * y_stride
    for turn in range(part * turns, tl.minimum((part + 1) * turns, tl.cdiv(K, DEPTH))):
        k0 = turn * DEPTH
        k = k0 + tl.arange(0, DEPTH)
        at = x + rows.to(tl.int64)[:, None] * x_stride + k[None, :]
        value = tl.load(at, mask=here[:, None] & (k < K)[None, :], other=0.0)
        w = _weights(codes, absmax, book, columns, there, k0 // 2, K // 2, COLUMNS, DEPTH, WHOLE).to(value.dtype)
        total = tl.dot(value, w.T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=here[:, None] & there[None, :])


@triton.jit
def _sum_parts(parts, bias, y, num_rows, out, num_parts, y_stride, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        at = parts + (part * num_rows + row) * out + columns
        total += tl.load(at, mask=columns < out, other=0.0)
    if BIAS:
        total += tl.load(bias + columns, mask=columns < out, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + columns, total.to(y.dtype.element_ty), mask=columns < out)


@triton.jit
def _backward(
    dy, codes, absmax, book, dx, num_rows, out, K, dy_stride, dx_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * COLUMNS
    here = rows < num_rows
    total, book = tl.zeros([ROWS, COLUMNS], tl.float32), tl.load(book + tl.arange(0, 16))
    for j0 in range(0, out, DEPTH):
        j = j0 + tl.arange(0, DEPTH)
        at = dy + rows.to(tl.int64)[:, None] * dy_stride + j[None, :]
        grad = tl.load(at, mask=here[:, None] & (j < out)[None, :], other=0.0)
        w = _weights(codes, absmax, book, j, j < out, first // 2, K // 2, DEPTH, COLUMNS, WHOLE).to(grad.dtype)
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


def _whole(columns: int) -> bool:
    """Whether rows of so many elements begin with a block."""
    return columns % (2 * int(BLOCK_BYTES.value)) == 0


def forward(x: Tensor, codes: Tensor, absmax: Tensor, out: int, bias: Tensor | None, spare: int) -> Tensor:
    """y [N, out] with `spare` columns free to the right of each row."""
    n, k = x.shape
    tile = tuning.tile("nf4_linear", (n, k, out), x.device, x.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = with_spare(n, out, spare, x)
    if not n:
        return y
    tiles = triton.cdiv(out, tile.columns), triton.cdiv(n, tile.rows)
    parts, turns = _parts(triton.cdiv(k, DEPTH), tiles[0] * tiles[1], x.device)
    target = y if parts == 1 else x.new_empty(parts * n, out, dtype=torch.float32)
    _forward[(*tiles, parts)](
        x, codes, absmax, _book(x.device), absmax if bias is None else bias, target, n, out, k, turns, x.stride(0),
        target.stride(0), BIAS=bias is not None and parts == 1, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH,
        WHOLE=_whole(k), PRECISION=_precision(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        _sum_parts[(triton.cdiv(out, SUM_BLOCK), n)](
            target, target if bias is None else bias, y, n, out, parts, y.stride(0), BIAS=bias is not None,
            BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return y


def _parts(turns: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Parts in which the columns are summed, more than one where there are too few programs to keep memory busy, and
    the turns of DEPTH columns in each."""
    wanted = min(triton.cdiv(PROGRAMS * tuning.multiprocessors(device), programs), turns // TURNS)
    each = triton.cdiv(turns, max(1, wanted))
    return triton.cdiv(turns, each), each


def backward(dy: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> Tensor:
    """dx [N, in]."""
    n, out = dy.shape
    tile = tuning.tile("nf4_linear_backward", (n, columns, out), dy.device, dy.dtype)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    dx = dy.new_empty(n, columns)
    if n:
        _backward[(triton.cdiv(columns, tile.columns), triton.cdiv(n, tile.rows))](
            dy, codes, absmax, _book(dy.device), dx, n, out, columns, dy.stride(0), dx.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH, WHOLE=_whole(columns),
            PRECISION=_precision(dy), num_warps=tile.warps, num_stages=tile.stages,
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
        {"DEPTH": DEPTH, "WHOLE": True, "PRECISION": "tf32"} | options,
        limits=Limits(registers=255, matrix=NARROW),
        tile=name,
        sizes=("ROWS", "COLUMNS"),
    )


COMPILED = [
    _case("nf4_linear", _forward, "x codes absmax book bias y num_rows out K turns x_stride y_stride", BIAS=True),
    _case("nf4_linear_backward", _backward, "dy codes absmax book dx num_rows out K dy_stride dx_stride"),
    Compiled(
        "nf4 linear, sum of parts",
        _sum_parts,
        _types("parts bias y num_rows out num_parts y_stride") | {"parts": "*fp32"},
        {"BIAS": True, "BLOCK": SUM_BLOCK},
        limits=Limits(registers=64, shared=0),
    ),
]
