"""Frozen product with low-rank terms of one or R runs on row blocks of the output (Hu et al. 2021, eq. 3).

For each adapted module m (rows rows[2m]:rows[2m + 1] of W) and the run j of a token:
    u_m = drop(x) A_mj^T;   y_m = x W_m^T + b_m + s_mj u_m B_mj^T.
Backward:  du_m = s dy_m B_mj;  dA_mj = du_m^T drop(x);  dB_mj = s dy_m^T u_m;  dx = dy W + sum_m mask_m (du_m A_mj).
x: [N, in]; W: [out, in]; A_m: [R, r_m, in] and B_m: [R, out_m, r_m] in fp32; scaling: M * R values, module first;
u: [N, sum of r_m]. Dropout's mask is drawn again wherever it is needed from `keys` [M, R] and `streams` [N].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare
from peftdyno.kernels.random import keep_mask, threshold


@dataclass(frozen=True)
class _Block:
    """One module of one run: its tokens, its rows of W, its columns of u, its scale and its dropout key."""

    module: int
    run: int
    tokens: slice
    rows: slice
    columns: slice
    scale: float


def _blocks(
    ranks: Sequence[int], scaling: Sequence[float], rows: Sequence[int], runs: Sequence[int]
) -> Iterator[_Block]:
    column = 0
    num_runs = len(runs) - 1
    for m, rank in enumerate(ranks):
        columns = slice(column, column + rank)
        for j in range(num_runs):
            tokens = slice(runs[j], runs[j + 1])
            yield _Block(m, j, tokens, slice(rows[2 * m], rows[2 * m + 1]), columns, scaling[m * num_runs + j])
        column = columns.stop


def _dropped(x: Tensor, block: _Block, dropout: float, streams: Tensor | None, keys: Tensor | None) -> Tensor:
    piece = x[block.tokens]
    if dropout == 0.0:
        return piece
    assert streams is not None and keys is not None
    keep = keep_mask(streams[block.tokens], x.shape[1], int(keys[block.module, block.run]), dropout)
    return piece * keep / (1.0 - threshold(dropout) / 65536)


def reference_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    x_spare: int,
    border: int,
    spare: int,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: one product for the base and two skinny ones a module and run."""
    u = reference_down(x, a, run_offsets, dropout, streams, keys)
    return reference_up(x, u, weight, bias, b, scaling, rows, run_offsets, x_spare, border, spare), u


def reference_down(
    x: Tensor,
    a: Sequence[Tensor],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    """u: a skinny product a module and run."""
    u = x.new_zeros(x.shape[0], sum(factor.shape[1] for factor in a))
    count = len(a)
    for block in _blocks(
        [factor.shape[1] for factor in a], [1.0] * (count * len(run_offsets)), [0] * 2 * count, run_offsets
    ):
        low = _dropped(x, block, dropout, streams, keys) @ a[block.module][block.run].to(x.dtype).t()
        u[block.tokens, block.columns] = low
    return u


def reference_up(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    x_spare: int,
    border: int,
    spare: int,
) -> Tensor:
    """y from x and u: one product for the base and a skinny one a module and run."""
    y = with_spare(x.shape[0], weight.shape[0], spare, x)
    y.copy_(torch.nn.functional.linear(x, weight, bias))
    add_up(y, u, b, scaling, rows, run_offsets)
    return y


def add_up(
    y: Tensor, u: Tensor, b: Sequence[Tensor], scaling: Sequence[float], rows: Sequence[int], run_offsets: Sequence[int]
) -> None:
    """y_m += s u_m B_m^T, in place."""
    for block in _blocks([factor.shape[2] for factor in b], scaling, rows, run_offsets):
        up = (block.scale * b[block.module][block.run]).to(y.dtype)
        y[block.tokens, block.rows] += u[block.tokens, block.columns] @ up.t()


def reference_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    border: int,
    need_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Plain PyTorch: gradients of x (empty unless needed) and, in fp32, of every A and B."""
    dx = dy @ weight if need_x else dy.new_empty(0)
    terms = (a, b, scaling, rows, run_offsets, dropout, streams, keys)
    return dx, *add_backward(dx, dy, x, u, *terms, need_x)


def add_backward(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    need_x: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every dA and dB in fp32; where needed, dx += sum_m mask_m (du_m A_m), in place."""
    da, db = [torch.zeros_like(t) for t in a], [torch.zeros_like(t) for t in b]
    for block in _blocks([factor.shape[1] for factor in a], scaling, rows, run_offsets):
        grad = dy[block.tokens, block.rows]
        du = grad @ (block.scale * b[block.module][block.run]).to(dy.dtype)
        dropped = _dropped(x, block, dropout, streams, keys)
        da[block.module][block.run] = (du.t() @ dropped).float()
        db[block.module][block.run] = (grad.t() @ u[block.tokens, block.columns]).float() * block.scale
        if need_x:
            term = du @ a[block.module][block.run].to(dy.dtype)
            dx[block.tokens] += _dropped(term, _same_tokens(block), dropout, _piece(streams, block), keys)
    return da, db


def _same_tokens(block: _Block) -> _Block:
    return _Block(block.module, block.run, slice(None), block.rows, block.columns, block.scale)


def _piece(streams: Tensor | None, block: _Block) -> Tensor | None:
    return None if streams is None else streams[block.tokens]


def _forward_shape(x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    columns = sum(factor.shape[1] for factor in a)
    return with_spare(x.shape[0], weight.shape[0], rest[-1], x), x.new_empty(x.shape[0], columns)


def _backward_shape(
    dy: Tensor, x: Tensor, u: Tensor, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = dy.new_empty((dy.shape[0], weight.shape[1]) if rest[-1] else (0,))
    return dx, [t.new_empty(t.shape) for t in a], [t.new_empty(t.shape) for t in b]


def _low_rank(
    a: Sequence[Tensor], b: Sequence[Tensor], run_offsets: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """(tokens, rank, in, out) of every module and run."""
    for down, up in zip(a, b, strict=True):
        for first, last in itertools.pairwise(run_offsets):
            yield last - first, down.shape[1], down.shape[2], up.shape[1]


def forward_cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> OwnedCost:
    """Base 2 N in out; adapter 2 N r (in + out) a module, an addition an output, dropout 2 an input element."""
    n, (out, columns) = x.shape[0], weight.shape
    run_offsets, dropout = rest[2], rest[3]
    base = Cost(
        matrix=2 * n * out * columns,
        pointwise=0 if bias is None else n * out,
        bytes=row_bytes(x, weight, bias) + n * out * x.element_size(),
    )
    matrix = pointwise = 0
    for tokens, rank, wide, tall in _low_rank(a, b, run_offsets):
        matrix += 2 * tokens * rank * (wide + tall)
        pointwise += tokens * tall + (2 * tokens * wide if dropout else 0)
    return OwnedCost(base, Cost(matrix=matrix, pointwise=pointwise, bytes=row_bytes(*a, *b)))


def down_cost(x: Tensor, a: Sequence[Tensor], run_offsets: Sequence[int], dropout: float) -> Cost:
    """2 N r in a module, and dropout 2 an input element; x itself lies in registers where its producer does this."""
    matrix = pointwise = 0
    for factor in a:
        tokens = run_offsets[-1] - run_offsets[0]
        matrix += 2 * tokens * factor.shape[1] * factor.shape[2]
        pointwise += 2 * tokens * factor.shape[2] if dropout else 0
    return Cost(matrix=matrix, pointwise=pointwise, bytes=row_bytes(*a))


def up_cost(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Sequence[Tensor], *rest: Any) -> OwnedCost:
    """Base 2 N in out; adapter 2 N r out a module and an addition an output."""
    n, (out, columns) = x.shape[0], weight.shape
    base = Cost(
        matrix=2 * n * out * columns,
        pointwise=0 if bias is None else n * out,
        bytes=row_bytes(x, weight, bias) + n * out * x.element_size(),
    )
    tokens = rest[2][-1] - rest[2][0]
    matrix = sum(2 * tokens * factor.shape[1] * factor.shape[2] for factor in b)
    pointwise = sum(tokens * factor.shape[1] for factor in b)
    return OwnedCost(base, Cost(matrix=matrix, pointwise=pointwise, bytes=row_bytes(u, *b)))


def backward_cost(
    dy: Tensor, x: Tensor, u: Tensor, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> OwnedCost:
    """Base 2 N in out for dx; the adapter's is that of `terms_backward_cost`, and x is read."""
    n, (out, columns) = dy.shape[0], weight.shape
    run_offsets, dropout, need_x = rest[2], rest[3], rest[-1]
    moved = row_bytes(dy, weight) + n * columns * dy.element_size()
    base = Cost(matrix=2 * n * out * columns, bytes=moved) if need_x else Cost()
    return OwnedCost(base, terms_backward_cost(u, a, b, run_offsets, dropout, need_x) + Cost(bytes=row_bytes(x)))


def terms_backward_cost(
    u: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], run_offsets: Sequence[int], dropout: float, need_x: bool
) -> Cost:
    """du, dA, dB and, where dx is needed, du A with its addition and mask; u and the factors are read, dA and dB
    written."""
    matrix = pointwise = 0
    for tokens, rank, wide, tall in _low_rank(a, b, run_offsets):
        matrix += 2 * tokens * rank * (2 * tall + wide * (2 if need_x else 1))
        masked = (2 if need_x else 1) if dropout else 0
        pointwise += tokens * wide * (int(need_x) + 2 * masked)
    return Cost(matrix=matrix, pointwise=pointwise, bytes=row_bytes(u, *a, *b) + row_bytes(*a, *b))


FORWARD = primitive(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scaling, int[] rows,"
    " int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, int x_spare, int border, int spare)"
    " -> (Tensor, Tensor)",
    reference=reference_forward,
    shape=_forward_shape,
    cost=forward_cost,
    **cpu.implementations("lora_linear"),
    **triton.implementations("lora_linear"),
)
UP = primitive(
    "lora_linear_up(Tensor x, Tensor u, Tensor weight, Tensor? bias, Tensor[] b, float[] scaling, int[] rows,"
    " int[] run_offsets, int x_spare, int border, int spare) -> Tensor",
    reference=reference_up,
    shape=lambda x, u, weight, *rest: with_spare(x.shape[0], weight.shape[0], rest[-1], x),
    cost=up_cost,
    **triton.implementations("lora_linear_up"),
)
"""`lora_linear` where the producer of x has made u; in a bordered product u stands beside x already."""
BACKWARD = primitive(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor u, Tensor weight, Tensor[] a, Tensor[] b, float[] scaling,"
    " int[] rows, int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, int border, bool need_x)"
    " -> (Tensor, Tensor[], Tensor[])",
    reference=reference_backward,
    shape=_backward_shape,
    cost=backward_cost,
    **cpu.implementations("lora_linear_backward"),
    **triton.implementations("lora_linear_backward"),
)
