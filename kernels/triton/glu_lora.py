"""Backward pass of the gated activation before a product with a low-rank term, on a GPU.

A program walks the tokens of a chunk for its columns. There it has gate and up, so it draws the product's input again
for dA instead of reading it, adds the low-rank term to dx before the activation's own gradient instead of in a pass of
its own, and draws dropout's mask once for both. Parts of dA are summed in a second launch, in a fixed order.
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
from peftdyno.kernels.triton.dropout import keep
from peftdyno.kernels.triton.glu import activation as activate
from peftdyno.kernels.triton.low_rank import modules_of, pack
from peftdyno.kernels.triton.output_gradient import du_and_db
from peftdyno.kernels.triton.row_chunks import row_chunks
from peftdyno.kernels.triton.skinny import PIECE_FP32, Dropout, precision, types, weight_gradients

CHUNK = 1024
"""Tokens over which one program sums dA."""


@triton.jit
def _backward(
    dx, gate_up, du, down, dgate_up, partials, table, streams, keys, F, rank, dx_stride, in_stride, du_stride,
    down_stride, out_stride, limit, kept, zero,
    SILU: tl.constexpr, DROP: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, c0 = tl.program_id(1), tl.program_id(0) * BLOCK
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    c, r = c0 + tl.arange(0, BLOCK), tl.arange(0, RANK)
    inside, ranked = (c < F)[None, :], r < rank
    p = (run * rank + r).to(tl.int64)[:, None]
    a = tl.load(down + p * down_stride + c[None, :], mask=ranked[:, None] & inside, other=0.0)
    if DROP:
        key = tl.load(keys + run)
    total = tl.zeros([RANK, BLOCK], tl.float32)
    for t0 in range(start, stop, TOKENS):
        rows = t0 + tl.arange(0, TOKENS)
        row, here = rows.to(tl.int64), rows < stop
        mask = here[:, None] & inside
        at = gate_up + row[:, None] * in_stride + c[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dx + row[:, None] * dx_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.load(du + row[:, None] * du_stride + r[None, :], mask=here[:, None] & ranked[None, :], other=0.0)
        turned = tl.load(du + row[None, :] * du_stride + r[:, None], mask=here[None, :] & ranked[:, None], other=0.0)
        value, slope = activate(gate, SILU)
        term = tl.dot(low, a, input_precision=PRECISION)
        # Without the sum the compiler draws the activation twice: here, and as the operand of the product below.
        inner = (value * up + term * zero).to(dx.dtype.element_ty)
        if DROP:
            stream = tl.load(streams + rows, mask=here, other=0)
            kept_here = keep(stream, key, c0, limit, BLOCK)
            inner = tl.where(kept_here, inner, 0.0)
            term = tl.where(kept_here, term * kept, 0.0)
        total = tl.dot(turned, inner, total, input_precision=PRECISION)
        grad += term
        out = dgate_up + row[:, None] * out_stride + c[None, :]
        tl.store(out, (grad * up * slope).to(dgate_up.dtype.element_ty), mask=mask)
        tl.store(out + F, (grad * value).to(dgate_up.dtype.element_ty), mask=mask)
    at = partials + (chunk.to(tl.int64) * rank + r[:, None]) * F + c[None, :]
    tl.store(at, total * kept, mask=ranked[:, None] & inside)


def backward(
    dx: Tensor,
    dy: Tensor,
    gate_up: Tensor,
    u: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    activation: str,
    spare: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of gate_up and, in fp32, of A and B of one module, from dx = dy W."""
    assert len(a) == 1, "one module reads the activation"
    n, f = dx.shape
    dx, dy, gate_up = (t if t.stride(1) == 1 else t.contiguous() for t in (dx, dy, gate_up))
    modules, drop = modules_of(a, rows, scaling), Dropout.of(dropout, streams, keys, dy.device)
    down, up = dy.new_empty(modules.spread, f), dy.new_empty(dy.shape[1], modules.spread)
    pack(a, b, modules, down, up)
    du, db = du_and_db(dy, u, up, modules, run_offsets, None)
    out, rank = with_spare(n, 2 * f, spare, gate_up), modules.columns
    chunks = row_chunks(run_offsets, CHUNK, dx.device)
    partials = dx.new_empty(chunks.count, rank * f, dtype=torch.float32)
    tile = tuning.tile("glu_lora_backward", (n, f, modules.rank), dx.device, dx.dtype)
    if chunks.count:
        _backward[(triton.cdiv(f, tile.columns), chunks.count)](
            dx, gate_up, du, down, out, partials, chunks.table, chunks.table if drop is None else drop.streams,
            chunks.table if drop is None else drop.keys, f, rank, dx.stride(0), gate_up.stride(0), du.stride(0),
            down.stride(0), out.stride(0), 0 if drop is None else drop.limit, 1.0 if drop is None else drop.kept, 0.0,
            SILU=activation == "silu", DROP=drop is not None, RANK=modules.rank, TOKENS=tile.rows, BLOCK=tile.columns,
            PRECISION=precision(dx), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, weight_gradients(partials, chunks, [(rank, f)]), db


_TYPES = types(
    "dx gate_up du down dgate_up partials table streams keys F rank dx_stride in_stride du_stride down_stride"
    " out_stride limit kept zero",
    zero="fp32", dx="*bf16", gate_up="*bf16", du="*bf16", down="*bf16", dgate_up="*bf16", partials="*fp32",
)  # fmt: skip
WORK = {80: 57.0, 90: 57.0, 100: 51.0}
"""Architecture -> most instructions an element, of SiLU at rank 16 with dropout; the activation's own are 29."""
_MIXED = {80: "HMMA", 90: "HGMMA+HMMA", 100: "HMMA+UTCHMMA"}


def _case(rank: int, silu: bool, drop: bool) -> Compiled:
    name = f"glu_backward and dA, {'silu' if silu else 'gelu'}{', dropout' if drop else ''}, rank {rank}"
    constants = {"SILU": silu, "DROP": drop, "RANK": rank, "PRECISION": "tf32"}
    work = WORK if rank == 16 and silu and drop else {}
    limits = Limits(registers=255, matrix=NARROW if rank == 16 else _MIXED, work=work)
    return Compiled(
        name, _backward, _TYPES, constants, limits=limits, tile="glu_lora_backward", sizes=("TOKENS", "BLOCK"),
        fp32={"RANK": min(rank, PIECE_FP32)},
    )  # fmt: skip


COMPILED = [_case(rank, silu, drop) for rank in (16, 64) for silu, drop in ((True, True), (True, False), (False, True))]
