"""4-bit NormalFloat weights dequantised on a GPU: a byte gives two neighbours, each times its block's maximum.

With double quantisation the maxima are 8-bit codes themselves, dequantised by a launch a module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits

BLOCK_BYTES = tl.constexpr(32)
"""Bytes of codes that share one absolute maximum: 64 elements (Dettmers et al. 2023)."""
BLOCKS = 64
"""Such blocks that one program dequantises."""


@triton.jit
def levels(code, book, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [ROWS, COLUMNS] of bytes [ROWS, COLUMNS / 2], high half first. The 16 levels lie in shared memory: a lookup
    there takes an address of 32 bits and no more than one access for a warp."""
    index = tl.reshape(tl.join(code >> 4, code & 15), [ROWS * COLUMNS])
    return tl.reshape(tl.gather(book, index, 0), [ROWS, COLUMNS])


@triton.jit
def _dequantise(codes, absmax, book, out, num_blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block, byte, element = tl.arange(0, BLOCKS), tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK)
    inside = first + block < num_blocks
    at = codes + first * (BLOCK // 2) + (block[:, None] * (BLOCK // 2) + byte[None, :])
    code = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
    scale = tl.load(absmax + first + block, mask=inside, other=0.0)[:, None]
    value = levels(code, tl.load(book + tl.arange(0, 16)), BLOCKS, BLOCK) * scale
    at = out + first * BLOCK + (block[:, None] * BLOCK + element[None, :])
    tl.store(at, value.to(out.dtype.element_ty), mask=inside[:, None])


def dequantise(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns] in `dtype`, formed in fp32."""
    from peftdyno.kernels.nf4 import codebook

    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if codes.numel():
        _dequantise[(triton.cdiv(absmax.numel(), BLOCKS),)](
            codes,
            absmax,
            codebook(codes.device),
            out,
            absmax.numel(),
            BLOCKS=BLOCKS,
            BLOCK=2 * BLOCK_BYTES.value,
            num_warps=4,
        )
    return out


@triton.jit
def _absmax(codes, absmax, offset, book, out, count, NESTED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(book + tl.load(codes + at, mask=inside, other=0).to(tl.int32))
    scale = tl.load(absmax + at // NESTED, mask=inside, other=0.0)
    tl.store(out + at, value * scale + tl.load(offset), mask=inside)


def absmax(codes: Tensor, absmax: Tensor, offsets: Tensor, sizes: Sequence[int]) -> Tensor:
    """fp32 [sum of sizes] absolute maxima of the blocks of every module, the reference's to the bit."""
    from peftdyno.kernels.nf4 import NESTED_BLOCK, dynamic_codes

    out, book = absmax.new_empty(codes.shape[0]), dynamic_codes(codes.device)
    start = first = 0
    for module, count in enumerate(sizes):
        if count:
            _absmax[(triton.cdiv(count, 1024),)](
                codes[start:], absmax[first:], offsets[module:], book, out[start:], count,
                NESTED=NESTED_BLOCK, BLOCK=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        start, first = start + count, first + triton.cdiv(count, NESTED_BLOCK)
    return out


COMPILED = [
    Compiled(
        "nf4_dequantise",
        _dequantise,
        {"codes": "*u8", "absmax": "*fp32", "book": "*fp32", "out": "*bf16", "num_blocks": "i32"},
        {"BLOCKS": BLOCKS, "BLOCK": 2 * BLOCK_BYTES.value},
        limits=Limits(registers=64, shared=8192, work={80: 11.0, 90: 11.0, 100: 11.0}),
        sizes=("BLOCKS", "BLOCK"),
    ),
    Compiled(
        "nf4_absmax",
        _absmax,
        {"codes": "*u8", "absmax": "*fp32", "offset": "*fp32", "book": "*fp32", "out": "*fp32", "count": "i32"},
        {"NESTED": 256, "BLOCK": 1024},
        limits=Limits(registers=64, shared=8192),
    ),
]
