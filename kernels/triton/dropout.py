"""Dropout's keep mask inside a kernel: the very bits of `peftdyno.kernels.random.keep_mask`, drawn where needed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from peftdyno.kernels.random import ROUNDS, threshold
from peftdyno.kernels.triton.compiled import Compiled, Limits

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _half_words(word0, word1, word2, word3):
    """[T, B] of each of four words -> [T, B, word // 2, word % 2] of their low and of their high 16 bits, joined."""
    low = tl.join(tl.join(word0 & 0xFFFF, word2 & 0xFFFF), tl.join(word1 & 0xFFFF, word3 & 0xFFFF))
    high = tl.join(tl.join(word0 >> 16, word2 >> 16), tl.join(word1 >> 16, word3 >> 16))
    return tl.join(low, high)


@triton.jit
def keep(stream, key, first, limit, COLUMNS: tl.constexpr):
    """bool [T, COLUMNS] of the columns from `first` (a multiple of 8) on; stream: int64 [T]; key: int64."""
    rows: tl.constexpr = stream.shape[0]
    blocks = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    zero = tl.zeros([rows, COLUMNS // 8], tl.uint32)
    c0 = zero + blocks[None, :]
    c1 = zero + (stream & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c2 = zero + ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)[:, None]
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    words = philox_impl(c0, c1, c2, zero, k0, k1, n_rounds=_ROUNDS)
    halves = _half_words(words[0], words[1], words[2], words[3])
    return tl.reshape(halves, [rows, COLUMNS]) >= limit


@triton.jit
def _mask(out, streams, key, num_rows, columns, limit, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    stream = tl.load(streams + rows, mask=rows < num_rows, other=0)
    kept = keep(stream, tl.load(key), first, limit, BLOCK)
    at = first + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (at < columns)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * columns + at, kept.to(tl.int8), mask=inside)


def keep_mask(streams: Tensor, columns: int, key: int, probability: float) -> Tensor:
    """The mask as a tensor, bool [N, columns]; for tests: kernels draw it in registers."""
    out = torch.empty(streams.numel(), columns, dtype=torch.int8, device=streams.device)
    keys = torch.tensor([key], device=streams.device)
    if out.numel():
        _mask[(triton.cdiv(out.shape[0], 32), triton.cdiv(columns, 64))](
            out, streams, keys, out.shape[0], columns, threshold(probability), ROWS=32, BLOCK=64
        )
    return out.bool()


COMPILED = [
    Compiled(
        "dropout mask",
        _mask,
        {"out": "*i8", "streams": "*i64", "key": "*i64", "num_rows": "i32", "columns": "i32", "limit": "i32"},
        {"ROWS": 32, "BLOCK": 64},
        limits=Limits(registers=96, shared=4096),
    )
]
