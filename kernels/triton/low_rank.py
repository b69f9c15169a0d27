"""The low-rank factors of one product, of all its modules and runs, in one matrix of P = R * (sum of r_m) columns.

Column p of (module m, run j, r) is R * (r_0 + ... + r_{m-1}) + j * r_m + r. `down` [P, in] holds A, `up` [out, P]
holds s B with zeros outside its module's rows: what stands in the spare rows and columns of a bordered weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import replay
from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.row_chunks import upload

FIELDS = tl.constexpr(6)


@dataclass(frozen=True)
class Modules:
    """table [M, 6] of int32: rank, first column of u, first p, first and last-plus-one row of W, first value of dB.

    rank: the largest, padded to what a tensor core multiplies; aligned: whether every entry is a multiple of 16.
    """

    table: Tensor
    scaling: Tensor
    ranks: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    num_runs: int
    rank: int
    aligned: bool

    @property
    def columns(self) -> int:
        """Columns of u: the sum of ranks."""
        return sum(self.ranks)

    @property
    def spread(self) -> int:
        """P."""
        return self.num_runs * self.columns


@functools.lru_cache(maxsize=512)
def _modules(
    ranks: tuple[int, ...], rows: tuple[int, ...], scaling: tuple[float, ...], device: torch.device
) -> Modules:
    pairs = tuple(zip(rows[::2], rows[1::2], strict=True))
    runs = len(scaling) // len(ranks)
    table, column, value = [], 0, 0
    for rank, (start, stop) in zip(ranks, pairs, strict=True):
        table.append((rank, column, runs * column, start, stop, value))
        column, value = column + rank, value + rank * (stop - start)
    return Modules(
        upload(np.array(table, np.int32), device),
        upload(np.array(scaling, np.float32), device),
        ranks,
        pairs,
        runs,
        max(16, triton.next_power_of_2(max(ranks))),
        all(entry % 16 == 0 for row in table for entry in row),
    )


def modules_of(a: Sequence[Tensor], rows: Sequence[int], scaling: Sequence[float]) -> Modules:
    """Tables of a product's modules; kept for the next steps."""
    ranks = tuple(factor.shape[1] for factor in a)
    return replay.keep(_modules(ranks, tuple(rows), tuple(scaling), a[0].device))


@triton.jit
def field(modules, m, NAME: tl.constexpr, ALIGNED: tl.constexpr):
    """One entry of the table of modules, with the alignment that makes wide loads possible."""
    value = tl.load(modules + m * FIELDS + NAME)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def store_u(
    value, narrow, wide, row, r, inside, u0, p0, rank, run, num_runs, narrow_stride, wide_stride, WIDE: tl.constexpr
):
    """Ranks `r` of a module's u [T, RANK] for rows [T, 1] of one run: in its columns of u and, WIDE, in the run's of
    all P, with zeros in those of other runs."""
    tl.store(narrow + row * narrow_stride + u0 + r[None, :], value, mask=inside)
    if WIDE:
        for j in range(num_runs):
            at = wide + row * wide_stride + p0 + j * rank + r[None, :]
            tl.store(at, tl.where(j == run, value, 0.0), mask=inside)


@triton.jit
def _pack_down(a, down, columns, rank, a_stride, stride, P0, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(a + p // rank * a_stride + p % rank * columns + at, mask=at < columns, other=0.0)
    tl.store(down + (P0 + p) * stride + at, value.to(down.dtype.element_ty), mask=at < columns)


@triton.jit
def _pack_up(
    b, scaling, up, out, first, last, rank, num_runs, b_stride, stride, P0, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    run, r = columns // rank, columns % rank
    inside = columns < num_runs * rank
    mine = (rows >= first) & (rows < last)
    at = run[None, :].to(tl.int64) * b_stride + (rows - first)[:, None] * rank + r[None, :]
    value = tl.load(b + at, mask=mine[:, None] & inside[None, :], other=0.0)
    value *= tl.load(scaling + run, mask=inside, other=0.0)[None, :]
    target = up + rows.to(tl.int64)[:, None] * stride + P0 + columns
    tl.store(target, value.to(up.dtype.element_ty), mask=(rows < out)[:, None] & inside[None, :])


def _dense(factor: Tensor) -> Tensor:
    """A factor [R, rows, columns] whose runs may lie apart, as they do in a bank, but each in one piece."""
    assert factor[0].is_contiguous(), factor.stride()
    return factor


def pack(a: Sequence[Tensor], b: Sequence[Tensor], modules: Modules, down: Tensor | None, up: Tensor | None) -> None:
    """Write A into `down` [P or more, in] and s B into `up` [out, P or more]; what is left over becomes zero."""
    p0 = 0
    for m, (rank, (first, last)) in enumerate(zip(modules.ranks, modules.rows, strict=True)):
        count = modules.num_runs * rank
        if down is not None:
            columns, block = down.shape[1], min(1024, triton.next_power_of_2(down.shape[1]))
            _pack_down[(count, triton.cdiv(columns, block))](
                _dense(a[m]), down, columns, rank, a[m].stride(0), down.stride(0), p0, BLOCK=block
            )
        if up is not None:
            block = min(1024, triton.next_power_of_2(count))
            rows = 1024 // block
            _pack_up[(triton.cdiv(up.shape[0], rows), triton.cdiv(count, block))](
                _dense(b[m]), modules.scaling[m * modules.num_runs :], up, up.shape[0], first, last, rank,
                modules.num_runs, b[m].stride(0), up.stride(0), p0, ROWS=rows, BLOCK=block,
            )  # fmt: skip
        p0 += count
    if down is not None and down.shape[0] > p0:
        down[p0:].zero_()
    if up is not None and up.shape[1] > p0:
        up[:, p0:].zero_()


_PACK_DOWN = "a down columns rank a_stride stride P0"
_PACK_UP = "b scaling up out first last rank num_runs b_stride stride P0"
COMPILED = [
    Compiled(
        "lora: pack A",
        _pack_down,
        dict.fromkeys(_PACK_DOWN.split(), "i32") | {"a": "*fp32", "down": "*bf16"},
        {"BLOCK": 1024},
        limits=Limits(registers=64, shared=0),
    ),
    *(
        Compiled(
            f"lora: pack B, {columns} columns",
            _pack_up,
            dict.fromkeys(_PACK_UP.split(), "i32") | {"b": "*fp32", "scaling": "*fp32", "up": "*bf16"},
            {"ROWS": 1024 // columns, "BLOCK": columns},
            limits=Limits(registers=64, shared=8192),
        )
        for columns in (16, 1024)
    ),
]
