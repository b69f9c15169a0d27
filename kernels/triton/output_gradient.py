"""What low-rank factors take from dy: du = dy (s B) and dB = s dy^T u, each from a read of dy, or both from one.

From one read, a program holds s B for its columns of dy and walks a chunk of tokens: it ends with its chunk's part of
dB, and leaves its columns' part of du for each token. Both are summed in launches of their own, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import tuning
from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.low_rank import Modules, field, store_u
from peftdyno.kernels.triton.row_chunks import RowChunks, row_chunks
from peftdyno.kernels.triton.skinny import outer, project, types, weight_gradients

CHUNK = 512
"""Tokens over which one program sums dB."""
SUM_ROWS = 64
"""Tokens of which one program sums du."""
MOST_RANKS = 32
"""Parts take 8 r (1 / BLOCK + 1 / CHUNK) bytes an element of dy; at rank 64 as many as the read that they save."""


@triton.jit
def _both(
    dy, up, u, du_parts, db_parts, table, modules, scaling, num_rows, columns, width, num_runs, dy_stride, up_stride,
    u_stride,
    RANK: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    block, m, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rank, u0 = field(modules, m, 0, ALIGNED), field(modules, m, 1, ALIGNED)
    p0, first = field(modules, m, 2, ALIGNED) + run * rank, field(modules, m, 3, ALIGNED)
    length = field(modules, m, 4, ALIGNED) - first
    c, r = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANK)
    if block * BLOCK < length:
        factor = up + (first + c).to(tl.int64)[:, None] * up_stride + p0 + r[None, :]
        b = tl.load(factor, mask=(c < length)[:, None] & (r < rank)[None, :], other=0.0)
        du_parts += block.to(tl.int64) * num_rows * columns + u0
        total = tl.zeros([RANK, BLOCK], tl.float32)
        for t0 in range(start, stop, TOKENS):
            rows = t0 + tl.arange(0, TOKENS)
            row, here = rows.to(tl.int64), rows < stop
            at = dy + row[:, None] * dy_stride + first + c[None, :]
            d = tl.load(at, mask=here[:, None] & (c < length)[None, :], other=0.0)
            at = u + row[None, :] * u_stride + u0 + r[:, None]
            total = tl.dot(tl.load(at, mask=here[None, :] & (r < rank)[:, None], other=0.0), d, total)
            tl.store(du_parts + row[:, None] * columns + r[None, :], tl.dot(d, b), mask=here[:, None] & (r < rank))
        total *= tl.load(scaling + m * num_runs + run)
        at = db_parts + chunk.to(tl.int64) * width + field(modules, m, 5, ALIGNED)
        at += c[None, :].to(tl.int64) * rank + r[:, None]
        tl.store(at, total, mask=(r < rank)[:, None] & (c < length)[None, :])


@triton.jit
def _sum_du(
    du_parts, narrow, wide, table, modules, num_rows, columns, narrow_stride, wide_stride, num_runs,
    WIDE: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    m, chunk = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rank, u0 = field(modules, m, 0, ALIGNED), field(modules, m, 1, ALIGNED)
    blocks = tl.cdiv(field(modules, m, 4, ALIGNED) - field(modules, m, 3, ALIGNED), BLOCK)
    rows, r = start + tl.arange(0, TOKENS), tl.arange(0, RANK)
    row = rows.to(tl.int64)[:, None]
    inside = (rows < stop)[:, None] & (r < rank)[None, :]
    total = tl.zeros([TOKENS, RANK], tl.float32)
    for block in range(blocks):
        at = du_parts + (tl.cast(block, tl.int64) * num_rows + row) * columns + u0 + r[None, :]
        total += tl.load(at, mask=inside, other=0.0)
    value, p0 = total.to(narrow.dtype.element_ty), field(modules, m, 2, ALIGNED)
    store_u(value, narrow, wide, row, r, inside, u0, p0, rank, run, num_runs, narrow_stride, wide_stride, WIDE)


def du_and_db(
    dy: Tensor, u: Tensor, up: Tensor, modules: Modules, runs: Sequence[int], wide: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """du [N, sum of r] and every module's dB [R, out, r] in fp32, from dy [N, out], u [N, sum of r] and s B [out, P].

    `wide` [N, P] receives du with zeros in the columns of other runs.
    """
    form = tuning.form("lora_output_gradient", (*dy.shape, modules.rank), dy.device)
    if form == "together" and modules.rank <= MOST_RANKS and dy.element_size() == 2:
        return together(dy, u, up, modules, runs, wide)
    return project(dy, up, modules, runs, wide, of_b=True), outer(u, dy, modules, runs, of_b=True)


def together(
    dy: Tensor, u: Tensor, up: Tensor, modules: Modules, runs: Sequence[int], wide: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """`du_and_db` from one read of dy."""
    n, du = dy.shape[0], dy.new_empty(dy.shape[0], modules.columns)
    tile = tuning.tile("lora_output_gradient", (*dy.shape, modules.rank), dy.device, dy.dtype)
    shapes = [(stop - start, rank) for rank, (start, stop) in zip(modules.ranks, modules.rows, strict=True)]
    width, blocks = sum(out * rank for out, rank in shapes), triton.cdiv(max(out for out, _ in shapes), tile.columns)
    chunks = row_chunks(runs, CHUNK, dy.device)
    du_parts = dy.new_empty(blocks, n, modules.columns, dtype=torch.float32)
    db_parts = dy.new_empty(chunks.count, width, dtype=torch.float32)
    if chunks.count:
        _both[(blocks, len(shapes), chunks.count)](
            dy, up, u, du_parts, db_parts, chunks.table, modules.table, modules.scaling, n, modules.columns, width,
            modules.num_runs, dy.stride(0), up.stride(0), u.stride(0), RANK=modules.rank, TOKENS=tile.rows,
            BLOCK=tile.columns, ALIGNED=modules.aligned, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _sum(du_parts, du, wide, modules, row_chunks(runs, SUM_ROWS, dy.device), tile.columns)
    return du, weight_gradients(db_parts, chunks, shapes)


def _sum(du_parts: Tensor, du: Tensor, wide: Tensor | None, modules: Modules, chunks: RowChunks, block: int) -> None:
    _sum_du[(len(modules.ranks), chunks.count)](
        du_parts, du, du if wide is None else wide, chunks.table, modules.table, *du_parts.shape[1:], du.stride(0),
        0 if wide is None else wide.stride(0), modules.num_runs, WIDE=wide is not None, RANK=modules.rank,
        TOKENS=SUM_ROWS, BLOCK=block, ALIGNED=modules.aligned, num_warps=4,
    )  # fmt: skip


_BOTH = types(
    "dy up u du_parts db_parts table modules scaling num_rows columns width num_runs dy_stride up_stride u_stride",
    dy="*bf16", up="*bf16", u="*bf16", du_parts="*fp32", db_parts="*fp32", scaling="*fp32",
)  # fmt: skip
_SUM = types(
    "du_parts narrow wide table modules num_rows columns narrow_stride wide_stride num_runs",
    du_parts="*fp32", narrow="*bf16", wide="*bf16",
)  # fmt: skip
_MIXED = {80: "HMMA", 90: "HGMMA+HMMA", 100: "HMMA+UTCHMMA"}
COMPILED = [
    *(
        Compiled(
            f"lora: dy B and dB, rank {rank}", _both, _BOTH, {"RANK": rank, "ALIGNED": True},
            limits=Limits(registers=200, matrix=_MIXED), tile="lora_output_gradient", sizes=("TOKENS", "BLOCK"),
        )
        for rank in (16, 32)
    ),
    Compiled(
        "lora: sum of du, rank 16", _sum_du, _SUM,
        {"WIDE": True, "RANK": 16, "TOKENS": SUM_ROWS, "BLOCK": 512, "ALIGNED": True},
        limits=Limits(registers=64, shared=0),
    ),
]  # fmt: skip
