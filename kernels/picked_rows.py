"""Rows picked by index, whose gradients are summed in a fixed order where a row is picked several times.

y_i = x_{index_i};   dx_j = sum over i with index_i = j, in ascending order of i, of dy_i.
x: [N, D]; index: int64 [L], in any order, with repetitions; y: [L, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import dispatch, triton
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes


def reference_backward(dy: Tensor, index: Tensor, num_rows: int, trained: bool) -> Tensor:
    """Plain PyTorch, which sorts the index on a GPU."""
    return dy.new_zeros(num_rows, dy.shape[1]).index_put_((index,), dy, accumulate=True)


def backward_cost(dy: Tensor, index: Tensor, num_rows: int, trained: bool) -> OwnedCost:
    """An addition an element of dy; bytes of zeros and sums written, and of dy, as where PyTorch adds row by row. The
    sorted index, its order and the bounds of each row's picks are workspace."""
    dx = num_rows * dy.shape[1] * dy.element_size()
    tables = 8 * (2 * index.numel() + 2 * (num_rows + 1))
    cost = Cost(pointwise=dy.numel(), bytes=2 * dx + 2 * row_bytes(dy) + row_bytes(index), workspace=tables)
    return OwnedCost(adapter=cost) if trained else OwnedCost(base=cost)


BACKWARD = primitive(
    "picked_rows_backward(Tensor dy, Tensor index, int num_rows, bool trained) -> Tensor",
    reference=reference_backward,
    shape=lambda dy, index, num_rows, trained: dy.new_empty(num_rows, dy.shape[1]),
    cost=backward_cost,
    **triton.implementations("picked_rows_backward"),
)


class _PickedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, trained: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.options = x.shape[0], trained
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return BACKWARD(dy, *ctx.saved_tensors, *ctx.options), None, None


def picked_rows(x: Tensor, index: Tensor, *, trained: bool = False) -> Tensor:
    """x[index]; the gradient's cost is the adapter's where x is `trained`.

    On a CPU PyTorch's own gradient has an order; on a GPU it takes atomics.
    """
    if dispatch.meant(x.device).type == "cuda" or dispatch.current() == "triton":
        y: Tensor = apply(_PickedRows, x, index, trained)
        return y
    return x.index_select(0, index)
