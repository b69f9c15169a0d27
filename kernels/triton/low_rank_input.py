"""Norm and gated activation on a GPU that multiply their rows by the low-rank factors A while these are at hand.

A program takes the rows of a chunk and walks over the columns; u gathers in registers. The norm walks twice, for a row
must be summed before it is scaled; its second walk finds the rows in the L2 cache. u is stored for the backward pass,
and once more to the right of y, with zeros in the columns of other runs, where the bordered product reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import NARROW, Compiled, Limits
from peftdyno.kernels.triton.dropout import dropped
from peftdyno.kernels.triton.glu import activation as activate
from peftdyno.kernels.triton.low_rank import FIELDS, Modules, modules_of, pack
from peftdyno.kernels.triton.row_chunks import row_chunks
from peftdyno.kernels.triton.skinny import Dropout, precision


@triton.jit
def _columns(modules, num_modules, run, RANKS: tl.constexpr):
    """Of every column of u: its module (-1 beyond the last), its row of A for the run, its module's rank."""
    c = tl.arange(0, RANKS)
    owner, p, width = tl.full([RANKS], -1, tl.int32), tl.zeros([RANKS], tl.int32), tl.zeros([RANKS], tl.int32)
    for m in range(num_modules):
        rank, u0 = tl.load(modules + m * FIELDS), tl.load(modules + m * FIELDS + 1)
        mine = (c >= u0) & (c < u0 + rank)
        owner = tl.where(mine, m, owner)
        p = tl.where(mine, tl.load(modules + m * FIELDS + 2) + run * rank + c - u0, p)
        width = tl.where(mine, rank, width)
    return owner, p, width


@triton.jit
def _multiply(
    total, block, factor, owner, p, stream, keys, run, num_modules, num_runs, k0, K, factor_stride, limit,
    DROP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + block A^T over the columns from k0 on; each module's own mask is drawn where there is dropout."""
    k = k0 + tl.arange(0, BLOCK)
    at = factor + p[None, :].to(tl.int64) * factor_stride + k[:, None]
    inside = (k < K)[:, None]
    if DROP:
        for m in range(num_modules):
            f = tl.load(at, mask=inside & (owner == m)[None, :], other=0.0)
            key = tl.load(keys + m * num_runs + run)
            total = tl.dot(dropped(block, stream, key, k0, limit), f, total, input_precision=PRECISION)
    else:
        f = tl.load(at, mask=inside & (owner >= 0)[None, :], other=0.0)
        total = tl.dot(block, f, total, input_precision=PRECISION)
    return total


@triton.jit
def _store(total, narrow, beside, row, here, owner, p, width, run, num_runs, narrow_stride, y_stride, kept):
    """u, and u spread over the runs in the columns from `beside` on."""
    value = (total * kept).to(narrow.dtype.element_ty)
    inside = here & (owner >= 0)[None, :]
    ranks: tl.constexpr = total.shape[1]
    c = tl.arange(0, ranks)
    tl.store(narrow + row * narrow_stride + c[None, :], value, mask=inside)
    for j in range(num_runs):
        at = beside + row * y_stride + (p + (j - run) * width)[None, :]
        tl.store(at, tl.where(j == run, value, 0.0).to(narrow.dtype.element_ty), mask=inside)


@triton.jit
def _sum(x, residual, row, k, mask, x_stride, residual_stride, ADD: tl.constexpr):
    value = tl.load(x + row * x_stride + k[None, :], mask=mask, other=0.0)
    if ADD:
        more = tl.load(residual + row * residual_stride + k[None, :], mask=mask, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
    return value


@triton.jit
def _norm(
    x, residual, weight, y, h, rstd, factor, narrow, table, modules, streams, keys, D, x_stride, residual_stride,
    y_stride, factor_stride, narrow_stride, num_modules, num_runs, eps, offset, limit, kept,
    ADD: tl.constexpr, DROP: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rows = start + tl.arange(0, ROWS)
    row, here = rows.to(tl.int64)[:, None], (rows < stop)[:, None]
    squares = tl.zeros([ROWS], tl.float32)
    for k0 in range(0, D, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        mask = here & (k < D)[None, :]
        value = _sum(x, residual, row, k, mask, x_stride, residual_stride, ADD)
        if ADD:
            tl.store(h + row * D + k[None, :], value, mask=mask)
        wide = value.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    scale = 1.0 / tl.sqrt(squares / D + eps)
    tl.store(rstd + rows, scale, mask=rows < stop)
    owner, p, width = _columns(modules, num_modules, run, RANKS)
    stream = tl.load(streams + rows, mask=rows < stop, other=0) if DROP else rows
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for k0 in range(0, D, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        mask = here & (k < D)[None, :]
        value = _sum(x, residual, row, k, mask, x_stride, residual_stride, ADD)
        w = tl.load(weight + k, mask=k < D, other=0.0).to(tl.float32) + offset
        normed = (value.to(tl.float32) * scale[:, None] * w[None, :]).to(value.dtype)
        tl.store(y + row * y_stride + k[None, :], normed, mask=mask)
        total = _multiply(
            total, normed, factor, owner, p, stream, keys, run, num_modules, num_runs, k0, D, factor_stride, limit,
            DROP, BLOCK, PRECISION,
        )  # fmt: skip
    _store(total, narrow, y + D, row, here, owner, p, width, run, num_runs, narrow_stride, y_stride, kept)


@triton.jit
def _glu(
    gate_up, y, factor, narrow, table, modules, streams, keys, F, in_stride, y_stride, factor_stride, narrow_stride,
    num_modules, num_runs, limit, kept,
    SILU: tl.constexpr, DROP: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rows = start + tl.arange(0, ROWS)
    row, here = rows.to(tl.int64)[:, None], (rows < stop)[:, None]
    owner, p, width = _columns(modules, num_modules, run, RANKS)
    stream = tl.load(streams + rows, mask=rows < stop, other=0) if DROP else rows
    total = tl.zeros([ROWS, RANKS], tl.float32)
    for k0 in range(0, F, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        mask = here & (k < F)[None, :]
        at = gate_up + row * in_stride + k[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        value, _ = activate(gate, SILU)
        inner = (value * up).to(y.dtype.element_ty)
        tl.store(y + row * y_stride + k[None, :], inner, mask=mask)
        total = _multiply(
            total, inner, factor, owner, p, stream, keys, run, num_modules, num_runs, k0, F, factor_stride, limit,
            DROP, BLOCK, PRECISION,
        )  # fmt: skip
    _store(total, narrow, y + F, row, here, owner, p, width, run, num_runs, narrow_stride, y_stride, kept)


def _prepared(
    like: Tensor, a: Sequence[Tensor], runs: Sequence[int], dropout: float, streams: Tensor | None, keys: Tensor | None
) -> tuple[Modules, Tensor, Dropout | None]:
    """(modules, A in the compute dtype [P, in], dropout)."""
    num_runs = len(runs) - 1
    modules = modules_of(a, [0, 0] * len(a), [1.0] * (len(a) * num_runs))
    factor = like.new_empty(modules.spread, a[0].shape[2])
    pack(a, [], modules, factor, None)
    return modules, factor, Dropout.of(dropout, streams, keys, like.device)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    eps: float,
    offset: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty without a residual), rstd [N] and u [N, sum of r]."""
    n, d = x.shape
    modules, factor, drop = _prepared(x, a, run_offsets, dropout, streams, keys)
    assert spare >= modules.spread, (spare, modules.spread)
    x = _rows(x)
    y, u, rstd = with_spare(n, d, spare, x), x.new_empty(n, modules.columns), x.new_empty(n, dtype=torch.float32)
    h = x.new_empty(0) if residual is None else x.new_empty(n, d)
    tile = tuning.tile("rms_norm_down", (n, d, padded(modules.columns)), x.device, x.dtype)
    chunks = row_chunks(run_offsets, tile.rows, x.device)
    if chunks.count:
        more = x if residual is None else _rows(residual)
        _norm[(chunks.count,)](
            x, more, weight.contiguous(), y, h, rstd, factor, u, chunks.table, modules.table,
            modules.table if drop is None else drop.streams, modules.table if drop is None else drop.keys,
            d, x.stride(0), more.stride(0), y.stride(0), factor.stride(0), u.stride(0), len(a), modules.num_runs,
            eps, offset, 0 if drop is None else drop.limit, 1.0 if drop is None else drop.kept,
            ADD=residual is not None, DROP=drop is not None, RANKS=padded(modules.columns), ROWS=tile.rows,
            BLOCK=tile.columns, PRECISION=precision(x), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, h, rstd, u


def glu(
    gate_up: Tensor,
    activation: str,
    a: Sequence[Tensor],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    spare: int,
) -> tuple[Tensor, Tensor]:
    """y [N, F] and u [N, sum of r]."""
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    modules, factor, drop = _prepared(gate_up, a, run_offsets, dropout, streams, keys)
    assert spare >= modules.spread, (spare, modules.spread)
    y, u = with_spare(n, f, spare, gate_up), gate_up.new_empty(n, modules.columns)
    tile = tuning.tile("glu_down", (n, f, padded(modules.columns)), y.device, y.dtype)
    chunks = row_chunks(run_offsets, tile.rows, y.device)
    if chunks.count:
        _glu[(chunks.count,)](
            gate_up, y, factor, u, chunks.table, modules.table,
            modules.table if drop is None else drop.streams, modules.table if drop is None else drop.keys,
            f, gate_up.stride(0), y.stride(0), factor.stride(0), u.stride(0), len(a), modules.num_runs,
            0 if drop is None else drop.limit, 1.0 if drop is None else drop.kept,
            SILU=activation == "silu", DROP=drop is not None, RANKS=padded(modules.columns), ROWS=tile.rows,
            BLOCK=tile.columns, PRECISION=precision(y), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, u


def padded(ranks: int) -> int:
    """Columns of u, padded to what a tensor core multiplies."""
    width: int = triton.next_power_of_2(ranks)
    return max(16, width)


def _case(name: str, ranks: int, kernel: object, tile: str, arguments: str, **options: object) -> Compiled:
    known = {"table": "*i32", "modules": "*i32", "streams": "*i64", "keys": "*i64", "rstd": "*fp32"}
    known |= dict.fromkeys(("x", "residual", "weight", "y", "h", "factor", "narrow", "gate_up"), "*bf16")
    known |= dict.fromkeys(("eps", "offset", "kept"), "fp32")
    types = {argument: known.get(argument, "i32") for argument in arguments.split()}
    constants = {"RANKS": ranks, "PRECISION": "tf32"} | options
    limits = Limits(registers=255, matrix=NARROW)
    return Compiled(
        f"{name}, {ranks} ranks", kernel, types, constants, limits=limits, tile=tile, sizes=("ROWS", "BLOCK")
    )


_NORM = (
    "x residual weight y h rstd factor narrow table modules streams keys D x_stride residual_stride y_stride"
    " factor_stride narrow_stride num_modules num_runs eps offset limit kept"
)
_GLU = (
    "gate_up y factor narrow table modules streams keys F in_stride y_stride factor_stride narrow_stride num_modules"
    " num_runs limit kept"
)
COMPILED = [
    case
    for ranks in (16, 64)
    for case in (
        _case("rms_norm and x A^T, dropout", ranks, _norm, "rms_norm_down", _NORM, ADD=True, DROP=True),
        _case("rms_norm and x A^T", ranks, _norm, "rms_norm_down", _NORM, ADD=True, DROP=False),
        _case("glu and x A^T, dropout", ranks, _glu, "glu_down", _GLU, SILU=True, DROP=True),
        _case("glu and x A^T", ranks, _glu, "glu_down", _GLU, SILU=True, DROP=False),
    )
]
