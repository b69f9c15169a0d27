"""Head and cross-entropy on a GPU: two library products a chunk of rows, and between them one kernel that turns the
chunk's logits into their gradient in place.

The logits of a chunk are in the dtype of x; the row sums are in fp32. A row is read twice, the second time mostly
from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.glu import _tanh

CHUNK_BYTES = 256 * 2**20
"""Most bytes of logits held at once (1046 rows in bf16 at a vocabulary of 128,256)."""
BLOCK = 4096


@triton.jit
def _logits(z, at, mask, softcap, CAP: tl.constexpr):
    value = tl.load(z + at, mask=mask, other=float("-inf")).to(tl.float32)
    if CAP:
        value = tl.where(mask, softcap * _tanh(value / softcap), float("-inf"))
    return value


@triton.jit
def _softmax_gradient(
    z, targets, loss, V, stride, softcap, GRADIENT: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        value = _logits(z, start + columns, start + columns < V, softcap, CAP)
        higher = tl.maximum(top, value)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.exp(value - finite)
        top = higher
    highest = tl.max(top, axis=0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    target = tl.load(targets + row)
    own = tl.load(z + target).to(tl.float32)
    if CAP:
        own = softcap * _tanh(own / softcap)
    tl.store(loss + row, lse - own)
    if GRADIENT:
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            value = _logits(z, start + columns, inside, softcap, CAP)
            slope = tl.exp(value - lse) - tl.where(start + columns == target, 1.0, 0.0)
            if CAP:
                ratio = tl.where(inside, value, 0.0) / softcap
                slope *= 1.0 - ratio * ratio
            tl.store(z + start + columns, slope.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _scale_rows(x, factors, out, num_rows, D, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
    factor = tl.load(factors + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    value = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = (value * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * D + columns, value, mask=mask)


def chunk_rows(head: Tensor) -> int:
    """Rows whose logits are held at once; a multiple of 128, which is whole tiles of the products."""
    return max(128, CHUNK_BYTES // (head.shape[0] * head.element_size()) // 128 * 128)


def forward(x: Tensor, head: Tensor, targets: Tensor, softcap: float, need_gradient: bool) -> tuple[Tensor, Tensor]:
    """loss [L] in fp32 and the gradient of its sum with respect to x [L, D] (empty unless needed)."""
    n, v = x.shape[0], head.shape[0]
    loss = x.new_empty(n, dtype=torch.float32)
    gradient = x.new_empty(n, x.shape[1]) if need_gradient else x.new_empty(0)
    rows = min(n, chunk_rows(head))
    logits = x.new_empty(rows, v)
    block = min(BLOCK, triton.next_power_of_2(v))
    for start in range(0, n, max(rows, 1)):
        stop = min(start + rows, n)
        z = logits[: stop - start]
        torch.mm(x[start:stop], head.t(), out=z)
        _softmax_gradient[(stop - start,)](
            z, targets[start:stop], loss[start:stop], v, z.stride(0), softcap,
            GRADIENT=need_gradient, CAP=softcap != 0.0, BLOCK=block, num_warps=8,
        )  # fmt: skip
        if need_gradient:
            torch.mm(z, head, out=gradient[start:stop])
    return loss, gradient


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """Each row of x [L, D] times its factor."""
    n, d = x.shape
    out = x.new_empty(n, d)
    block = min(1024, triton.next_power_of_2(d))
    if n:
        _scale_rows[(triton.cdiv(n, 4), triton.cdiv(d, block))](
            x, factors.contiguous(), out, n, d, x.stride(0), ROWS=4, BLOCK=block, num_warps=4
        )
    return out


COMPILED = [
    Compiled(
        "label_loss",
        _softmax_gradient,
        {"z": "*bf16", "targets": "*i64", "loss": "*fp32", "V": "i32", "stride": "i32", "softcap": "fp32"},
        {"GRADIENT": True, "CAP": False, "BLOCK": BLOCK},
        num_warps=8,
        limits=Limits(registers=128, shared=4096),
    ),
    Compiled(
        "label_loss, soft-capped",
        _softmax_gradient,
        {"z": "*bf16", "targets": "*i64", "loss": "*fp32", "V": "i32", "stride": "i32", "softcap": "fp32"},
        {"GRADIENT": True, "CAP": True, "BLOCK": BLOCK},
        num_warps=8,
        limits=Limits(registers=128, shared=4096),
    ),
    Compiled(
        "scale_rows",
        _scale_rows,
        {"x": "*bf16", "factors": "*fp32", "out": "*bf16", "num_rows": "i32", "D": "i32", "stride": "i32"},
        {"ROWS": 4, "BLOCK": 1024},
        limits=Limits(registers=96, shared=1024),
    ),
]
