"""Rotary embedding on a GPU, in place: a block of tokens a program, which reads their angles once for all heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits

TOKENS, HEADS = 8, 8
"""Tokens and heads of one program."""


@triton.jit
def _turn(
    qkv, cos, sin, num_rows, num_heads, stride, sign,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    angle = rows.to(tl.int64)[:, None] * HALF + columns
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0) * sign
    first = tl.program_id(1) * HEADS
    for head in range(first, tl.minimum(first + HEADS, num_heads)):
        at = qkv + rows.to(tl.int64)[:, None] * stride + head * (2 * HALF) + columns
        x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, (x1 * c - x2 * s).to(qkv.dtype.element_ty), mask=mask)
        tl.store(at + HALF, (x2 * c + x1 * s).to(qkv.dtype.element_ty), mask=mask)


def turn(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> None:
    """Turn the first `num_heads` heads of each row."""
    n, half = cos.shape
    if n == 0:
        return
    assert qkv.stride(1) == 1, qkv.stride()
    _turn[(triton.cdiv(n, TOKENS), triton.cdiv(num_heads, HEADS))](
        qkv, cos.contiguous(), sin.contiguous(), n, num_heads, qkv.stride(0), -1.0 if inverse else 1.0,
        HALF=half, BLOCK=triton.next_power_of_2(half), TOKENS=TOKENS, HEADS=HEADS, num_warps=4,
    )  # fmt: skip


COMPILED = [
    Compiled(
        "rotary_",
        _turn,
        {
            "qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "num_rows": "i32", "num_heads": "i32",
            "stride": "i32", "sign": "fp32",
        },
        {"HALF": 64, "BLOCK": 64, "TOKENS": TOKENS, "HEADS": HEADS},
        limits=Limits(registers=64, shared=1024),
    )
]  # fmt: skip
