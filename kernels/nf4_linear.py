"""Product with a weight in 4 bits that is dequantised on the way: y = x W^T + b forward, dx = dy W backward.

x: [N, in]; codes: uint8 [out * in / 2] and absmax: fp32 [out * in / 64] of W [out, in] (see `nf4`); b: [out];
y: [N, out].
Each weight is rounded to the dtype of x before it is multiplied, as the dequantised weight is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftdyno.kernels import triton, tuning
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare
from peftdyno.kernels.nf4 import BLOCK, Nf4Weight, reference_dequantise


def reference_forward(x: Tensor, codes: Tensor, absmax: Tensor, out: int, bias: Tensor | None, spare: int) -> Tensor:
    """Dequantise, then one library product."""
    y = with_spare(x.shape[0], out, spare, x)
    return y.copy_(torch.nn.functional.linear(x, reference_dequantise(codes, absmax, out, x.shape[1], x.dtype), bias))


def reference_backward(dy: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> Tensor:
    """Dequantise, then one library product."""
    return torch.mm(dy, reference_dequantise(codes, absmax, dy.shape[1], columns, dy.dtype))


def forward_cost(x: Tensor, codes: Tensor, absmax: Tensor, out: int, bias: Tensor | None, spare: int) -> OwnedCost:
    """2 N in out; a multiplication a weight; an addition an output with a bias."""
    n, columns = x.shape
    pointwise = out * columns + (0 if bias is None else n * out)
    moved = row_bytes(x, codes, absmax, bias) + n * out * x.element_size()
    return OwnedCost(Cost(matrix=2 * n * out * columns, pointwise=pointwise, bytes=moved))


def backward_cost(dy: Tensor, codes: Tensor, absmax: Tensor, columns: int) -> OwnedCost:
    """2 N in out; a multiplication a weight."""
    n, out = dy.shape
    moved = row_bytes(dy, codes, absmax) + n * columns * dy.element_size()
    return OwnedCost(Cost(matrix=2 * n * out * columns, pointwise=out * columns, bytes=moved))


FORWARD = primitive(
    "nf4_linear(Tensor x, Tensor codes, Tensor absmax, int out, Tensor? bias, int spare) -> Tensor",
    reference=reference_forward,
    shape=lambda x, codes, absmax, out, bias, spare: with_spare(x.shape[0], out, spare, x),
    cost=forward_cost,
    **triton.implementations("nf4_linear"),
)
BACKWARD = primitive(
    "nf4_linear_backward(Tensor dy, Tensor codes, Tensor absmax, int columns) -> Tensor",
    reference=reference_backward,
    shape=lambda dy, codes, absmax, columns: dy.new_empty(dy.shape[0], columns),
    cost=backward_cost,
    **triton.implementations("nf4_linear_backward"),
)


def fused(operator: str, rows: Tensor, weight: Nf4Weight) -> bool:
    """Whether a product of `rows` with the weight is to dequantise on the way: where that was measured to be faster,
    and no block of the weight crosses from one of its rows into the next."""
    out, columns = weight.shape
    form = tuning.form(operator, (rows.shape[0], columns, out), rows.device)
    return form == "fused" and columns % BLOCK == 0 and rows.dtype == weight.dtype


def product(x: Tensor, weight: Nf4Weight, bias: Tensor | None, spare: int) -> Tensor:
    """y [N, out] with `spare` columns free to the right of each row."""
    y: Tensor = FORWARD(x, weight.codes, weight.scales(), weight.shape[0], bias, spare)
    return y


def product_backward(dy: Tensor, weight: Nf4Weight) -> Tensor:
    """dx [N, in]."""
    dx: Tensor = BACKWARD(dy, weight.codes, weight.scales(), weight.shape[1])
    return dx
