"""Frozen product with low-rank terms on a GPU, three forms, chosen a shape class by `tuning.form`.

Bordered: x A^T stands in the columns to the right of x, s B in those to the right of W, and ONE library product
gives y; A stands in the rows below W, and ONE library product gives dx, where dropout does not mask the term.
Plain: the base product, then the low-rank term added by a second product that reads and writes y (or dx) again.
Fused: one Triton product with the low-rank term in its epilogue (`lora_gemm`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton import lora_gemm
from peftdyno.kernels.triton.low_rank import Modules, modules_of, pack
from peftdyno.kernels.triton.output_gradient import du_and_db
from peftdyno.kernels.triton.skinny import Dropout, add_masked, outer, project


def _widened(x: Tensor, columns: int) -> Tensor:
    """x with the columns that lie to the right of its rows in memory; to write there does not change x for autograd."""
    return x.data.as_strided((x.shape[0], x.shape[1] + columns), x.stride())


def _below(weight: Tensor, rows: int) -> Tensor:
    """The spare rows below a bordered weight."""
    start = weight.storage_offset() + weight.shape[0] * weight.stride(0)
    return weight.data.as_strided((rows, weight.shape[1]), weight.stride(), start)


def _has_spare(x: Tensor, columns: int) -> bool:
    """Whether a gradient lies in memory of its own with `columns` free to the right of each row."""
    n, width = x.shape
    allocated = x.untyped_storage().nbytes() // x.element_size()
    return (
        columns > 0
        and x.storage_offset() == 0
        and x.stride() == (width + columns, 1)
        and allocated == n * (width + columns)
    )


def forward(
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
    """y [N, out] and u [N, sum of r]."""
    modules, drop = modules_of(a, rows, scaling), Dropout.of(dropout, streams, keys, x.device)
    form = _form("lora_linear", x, weight, modules)
    if form == "bordered" and min(x_spare, border) >= modules.spread:
        y = with_spare(x.shape[0], weight.shape[0], spare, x)
        whole, factors = _widened(x, border), _widened(weight, border)
        pack(a, b, modules, _below(weight, border), factors[:, weight.shape[1] :])
        wide = whole[:, x.shape[1] :]
        wide[:, modules.spread :].zero_()
        u = project(x, _below(weight, border), modules, run_offsets, wide, of_b=False, dropout=drop)
        return _product(whole, factors, bias, y), u
    down, up, by_run = _scratch(x, weight, modules)
    pack(a, b, modules, down, up)
    u = project(x, down, modules, run_offsets, by_run, of_b=False, dropout=drop)
    own = u if by_run is None else by_run
    if form == "fused" and _fusable(weight.shape[0] + spare, x, weight, own, up):
        return lora_gemm.product(x, weight, own, up, bias, spare), u
    y = with_spare(x.shape[0], weight.shape[0], spare, x)
    return _product(x, weight, bias, y).addmm_(own, up.t()), u


def up(
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
    """y [N, out] from u [N, sum of r]; where x has room beside it, u stands there already, spread over the runs."""
    modules = modules_of([factor.transpose(1, 2) for factor in b], rows, scaling)
    y = with_spare(x.shape[0], weight.shape[0], spare, x)
    if min(x_spare, border) >= modules.spread:
        whole, factors = _widened(x, border), _widened(weight, border)
        pack([], b, modules, None, factors[:, weight.shape[1] :])
        whole[:, x.shape[1] + modules.spread :].zero_()
        return _product(whole, factors, bias, y)
    factor = x.new_empty(weight.shape[0], modules.spread)
    pack([], b, modules, None, factor)
    return _product(x, weight, bias, y).addmm_(_spread(u, modules, run_offsets), factor.t())


def _spread(u: Tensor, modules: Modules, run_offsets: Sequence[int]) -> Tensor:
    """u with every run's rows in the run's own columns, [N, P]."""
    if modules.num_runs == 1:
        return u
    wide, column = u.new_zeros(u.shape[0], modules.spread), 0
    for rank in modules.ranks:
        for run, (start, stop) in enumerate(itertools.pairwise(run_offsets)):
            first = modules.num_runs * column + run * rank
            wide[start:stop, first : first + rank] = u[start:stop, column : column + rank]
        column += rank
    return wide


def _form(operator: str, x: Tensor, weight: Tensor, modules: Modules) -> str:
    """The form for tokens x in x out x columns of all low-rank terms."""
    out, columns = weight.shape
    return tuning.form(operator, (x.shape[0], columns, out, modules.spread), x.device)


def _fusable(columns: int, *operands: Tensor) -> bool:
    """Whether one Triton product serves rows of so many elements: they too start at multiples of 16 bytes, and all is
    of 16 bits, in which forms are measured; in fp32 it would have no tensor cores."""
    size = operands[0].element_size()
    return size == 2 and columns * size % 16 == 0 and lora_gemm.suitable(*operands)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=y)
    return torch.addmm(bias, x, weight.t(), out=y)


def _scratch(x: Tensor, weight: Tensor, modules: Modules) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for A, s B and, with several runs, u spread over the runs' columns."""
    return _room(x, weight.shape[0], weight.shape[1], modules)


def _room(x: Tensor, out: int, columns: int, modules: Modules) -> tuple[Tensor, Tensor, Tensor | None]:
    down, up = x.new_empty(modules.spread, columns), x.new_empty(out, modules.spread)
    return down, up, x.new_empty(x.shape[0], modules.spread) if modules.num_runs > 1 else None


def backward(
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
    """Gradients of x (empty unless needed) and, in fp32, of every A and B."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    modules, drop = modules_of(a, rows, scaling), Dropout.of(dropout, streams, keys, dy.device)
    form = _form("lora_linear_backward", dy, weight, modules) if need_x and drop is None else "masked"
    one_product = form == "bordered" and border >= modules.spread and _has_spare(dy, border)
    down, up, wide = _scratch(dy, weight, modules)
    if one_product:
        down, wide = _below(weight, border), _widened(dy, border)[:, dy.shape[1] :]
        wide[:, modules.spread :].zero_()
    pack(a, b, modules, down if need_x else None, up)
    du, db = du_and_db(dy, u, up, modules, run_offsets, wide if need_x and drop is None else None)
    da = outer(du, x, modules, run_offsets, of_b=False, dropout=drop)
    if not need_x:
        return dy.new_empty(0), da, db
    if one_product:
        stacked = weight.as_strided((weight.shape[0] + border, weight.shape[1]), weight.stride())
        return torch.mm(_widened(dy, border), stacked), da, db
    own = du if wide is None else wide
    if form == "fused" and _fusable(weight.shape[1], dy, weight, own, down):
        return lora_gemm.product_backward(dy, weight, own, down), da, db
    dx = torch.mm(dy, weight)
    if drop is not None:
        add_masked(dx, du, down, modules, run_offsets, drop)
    else:
        dx.addmm_(own, down)
    return dx, da, db


def add(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    """The low-rank terms added to y [N, out] in place; u [N, sum of r]."""
    modules, drop = modules_of(a, rows, scaling), Dropout.of(dropout, streams, keys, x.device)
    down, up, by_run = _room(x, y.shape[1], x.shape[1], modules)
    pack(a, b, modules, down, up)
    u = project(x, down, modules, run_offsets, by_run, of_b=False, dropout=drop)
    y.addmm_(u if by_run is None else by_run, up.t())
    return u


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
    """Every dA and dB in fp32; the low-rank terms' part of dx added in place, where it is needed."""
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    modules, drop = modules_of(a, rows, scaling), Dropout.of(dropout, streams, keys, dy.device)
    down, up, wide = _room(dy, dy.shape[1], x.shape[1], modules)
    pack(a, b, modules, down if need_x else None, up)
    wide = wide if need_x and drop is None else None
    du, db = du_and_db(dy, u, up, modules, run_offsets, wide)
    da = outer(du, x, modules, run_offsets, of_b=False, dropout=drop)
    if need_x and drop is not None:
        add_masked(dx, du, down, modules, run_offsets, drop)
    elif need_x:
        dx.addmm_(du if wide is None else wide, down)
    return da, db
