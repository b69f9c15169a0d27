"""Dropout's keep mask inside a kernel: the very bits of `peftdyno.kernels.random.keep_mask`, drawn where needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.random import M0, M1, ROUNDS, W0, W1, threshold
from peftdyno.kernels.triton.compiled import Compiled, Limits

_ROUNDS = tl.constexpr(ROUNDS)
_M0, _M1, _W0, _W1 = tl.constexpr(M0), tl.constexpr(M1), tl.constexpr(W0), tl.constexpr(W1)


@triton.jit
def _philox(c0, c1, c2, k0, k1):
    """Four words of a counter whose last word is 0; one wide multiplication gives both halves of a product."""
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(_ROUNDS):
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def _draw(stream, key, first, COLUMNS: tl.constexpr):
    """The four words of each 8 columns from `first` (a multiple of 8) on; stream: int64 [T]; key: int64."""
    blocks = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros([stream.shape[0], COLUMNS // 8], tl.uint32)
    c1 = zero + (stream & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c2 = zero + ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    return _philox(zero + blocks[None, :], c1, c2, key.to(tl.uint32), (key >> 32).to(tl.uint32))


@triton.jit
def _halves(word0, word1, word2, word3, COLUMNS: tl.constexpr):
    """uint16 [T, COLUMNS] of four uint32 [T, COLUMNS / 8]. Columns are paired by word until the last moment, so that
    a change of layout moves whole words."""
    rows: tl.constexpr = word0.shape[0]
    pairs = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [rows, COLUMNS // 2])
    return tl.reshape(tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)), [rows, COLUMNS])


@triton.jit
def _ones(word, limit):
    """0xFFFF in either half of a word that is not below the limit: two comparisons without a predicate.

    The top bit of (h | 0x8000) - (limit's low 15 bits) tells how the low 15 bits compare, and nothing is borrowed from
    the other half; a majority with the top bits of h and of ~limit settles the rest.
    """
    low, top = limit & 0x7FFF, (~limit) & 0x8000
    difference = (word | 0x80008000) - (low | (low << 16)).to(tl.uint32)
    high = (top | (top << 16)).to(tl.uint32)
    at_least = (word & difference) | ((word | difference) & high)
    return ((at_least >> 15) & 0x00010001) * 0xFFFF


@triton.jit
def keep(stream, key, first, limit, COLUMNS: tl.constexpr):
    """bool [T, COLUMNS] of the columns from `first` (a multiple of 8) on; stream: int64 [T]; key: int64."""
    word0, word1, word2, word3 = _draw(stream, key, first, COLUMNS)
    return _halves(word0, word1, word2, word3, COLUMNS) >= limit


@triton.jit
def dropped(x, stream, key, first, limit):
    """x [T, columns] with zeros where its mask drops; elements of 16 bits are masked two at a time."""
    columns: tl.constexpr = x.shape[1]
    if x.dtype.primitive_bitwidth == 16:
        word0, word1, word2, word3 = _draw(stream, key, first, columns)
        ones = _halves(_ones(word0, limit), _ones(word1, limit), _ones(word2, limit), _ones(word3, limit), columns)
        masked = (x.to(tl.uint16, bitcast=True) & ones).to(x.dtype, bitcast=True)
    else:
        masked = tl.where(keep(stream, key, first, limit, columns), x, 0.0)
    return masked


@triton.jit
def _drop(x, out, streams, key, num_rows, columns, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    columns_here = first + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns_here < columns)[None, :]
    at = rows.to(tl.int64)[:, None] * columns + columns_here[None, :]
    stream = tl.load(streams + rows, mask=rows < num_rows, other=0)
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + at, dropped(value, stream, tl.load(key), first, limit), mask=inside)


def drop(x: Tensor, streams: Tensor, key: int, probability: float) -> Tensor:
    """x [N, columns] with zeros where the mask drops; for tests: other kernels draw it where they read x."""
    out, keys = torch.empty_like(x), torch.tensor([key], device=x.device)
    if out.numel():
        _drop[(triton.cdiv(out.shape[0], 32), triton.cdiv(out.shape[1], 64))](
            x.contiguous(), out, streams, keys, out.shape[0], out.shape[1], threshold(probability), ROWS=32, BLOCK=64
        )
    return out


_DROP = {"x": "*bf16", "out": "*bf16", "streams": "*i64", "key": "*i64"}
COMPILED = [
    Compiled(
        "dropout",
        _drop,
        _DROP | {"num_rows": "i32", "columns": "i32", "limit": "i32"},
        {"ROWS": 32, "BLOCK": 64},
        limits=Limits(registers=96, shared=4096),
    )
]
