"""Product with a frozen weight: y = x W^T + b forward, dx = dy W backward; nothing but the weight is kept.

x: [N, in], W: [out, in] (any row stride, or in 4 bits: dequantised anew in each direction), b: [out], y: [N, out].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, nf4_linear, triton
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare
from peftdyno.kernels.nf4 import Nf4Weight, Weight, dense


def reference_forward(x: Tensor, weight: Tensor, bias: Tensor | None, spare: int) -> Tensor:
    """One library product."""
    if spare == 0:
        return torch.nn.functional.linear(x, weight, bias)
    y = with_spare(x.shape[0], weight.shape[0], spare, x)
    torch.mm(x, weight.t(), out=y)
    return y if bias is None else y.add_(bias)


def reference_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """One library product."""
    return torch.mm(dy, weight)


def forward_cost(x: Tensor, weight: Tensor, bias: Tensor | None, spare: int) -> OwnedCost:
    """2 N in out, and one addition an output element with a bias."""
    n, (out, columns) = x.shape[0], weight.shape
    moved = row_bytes(x, weight, bias) + n * out * x.element_size()
    return OwnedCost(Cost(matrix=2 * n * out * columns, pointwise=0 if bias is None else n * out, bytes=moved))


def backward_cost(dy: Tensor, weight: Tensor) -> OwnedCost:
    """2 N in out."""
    n, (out, columns) = dy.shape[0], weight.shape
    moved = row_bytes(dy, weight) + n * columns * dy.element_size()
    return OwnedCost(Cost(matrix=2 * n * out * columns, bytes=moved))


FORWARD = primitive(
    "linear(Tensor x, Tensor weight, Tensor? bias, int spare) -> Tensor",
    reference=reference_forward,
    shape=lambda x, weight, bias, spare: with_spare(x.shape[0], weight.shape[0], spare, x),
    cost=forward_cost,
    **cpu.implementations("linear"),
    **triton.implementations("linear"),
)
BACKWARD = primitive(
    "linear_backward(Tensor dy, Tensor weight) -> Tensor",
    reference=reference_backward,
    shape=lambda dy, weight: dy.new_empty(dy.shape[0], weight.shape[1]),
    cost=backward_cost,
    **cpu.implementations("linear_backward"),
    **triton.implementations("linear_backward"),
)


def product(x: Tensor, weight: Weight, bias: Tensor | None, spare: int) -> Tensor:
    """y; a weight in 4 bits is dequantised before, or on the way where that is faster."""
    if isinstance(weight, Nf4Weight) and nf4_linear.fused("nf4_linear", x, weight):
        return nf4_linear.product(x, weight, bias, spare)
    y: Tensor = FORWARD(x, dense(weight), bias, spare)
    return y


def product_backward(dy: Tensor, weight: Weight) -> Tensor:
    """dx; see `product`."""
    if isinstance(weight, Nf4Weight) and nf4_linear.fused("nf4_linear_backward", dy, weight):
        return nf4_linear.product_backward(dy, weight)
    dx: Tensor = BACKWARD(dy, dense(weight))
    return dx


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, spare: int) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias, spare)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return product_backward(dy, ctx.weight), None, None, None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, spare: int = 0) -> Tensor:
    """Product with a frozen weight; `spare` columns are left free to the right of each output row in memory."""
    y: Tensor = apply(_Linear, x, weight, bias, spare)
    return y
