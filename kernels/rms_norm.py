"""RMS norm with an optional residual addition before it, and weights of one or R runs.

h = x + residual;  rstd = (mean(h^2) + eps)^-1/2;  y = h * rstd * (offset + w)          (Zhang & Sennrich 2019)
Backward, with g = dy * (offset + w), a row at a time:  dh += rstd * (g - h * rstd^2 * mean(g * h)).
x, residual, y, h: [N, D]; weight: [D] or [R, D], then rows run_offsets[j]:run_offsets[j + 1] use weight[j].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare
from peftdyno.kernels.transfer import sent


def rows_of_runs(values: Tensor, run_offsets: Sequence[int]) -> Tensor:
    """[R, ...] values repeated to one row a token, [N, ...]."""
    lengths = sent(torch.tensor([stop - start for start, stop in itertools.pairwise(run_offsets)]), values.device)
    return values.repeat_interleave(lengths, dim=0, output_size=run_offsets[-1] - run_offsets[0])


def _weights(weight: Tensor, run_offsets: Sequence[int], offset: float) -> Tensor:
    rows = weight if weight.dim() == 1 else rows_of_runs(weight, run_offsets)
    return rows.float() + offset


def reference_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    run_offsets: Sequence[int],
    eps: float,
    offset: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: y, h (empty without a residual) and rstd [N] in fp32."""
    h = x if residual is None else x + residual
    wide = h.float()
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    y = with_spare(x.shape[0], x.shape[1], spare, x)
    y.copy_(wide * rstd[:, None] * _weights(weight, run_offsets, offset))
    return y, (x.new_empty(0) if residual is None else h), rstd


def reference_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    run_offsets: Sequence[int],
    offset: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: gradient of h (and so of x and of the residual), and of the weight in fp32 (or empty)."""
    wide, grad = h.float(), dy.float()
    normed = wide * rstd[:, None]
    g = grad * _weights(weight, run_offsets, offset)
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if dh is not None:
        dx += dh
    return dx.to(h.dtype), _weight_gradient(grad * normed, weight, run_offsets, need_weight)


def _weight_gradient(products: Tensor, weight: Tensor, run_offsets: Sequence[int], need: bool) -> Tensor:
    if not need:
        return products.new_empty(0)
    if weight.dim() == 1:
        return products.sum(0)
    pieces = [products[a:b].sum(0) for a, b in itertools.pairwise(run_offsets)]
    return torch.stack(pieces)


def _forward_shape(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return with_spare(x.shape[0], x.shape[1], rest[-1], x), h, x.new_empty(x.shape[0], dtype=torch.float32)


def _backward_shape(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if rest[-1] else (0,), dtype=torch.float32)
    return h.new_empty(h.shape), dweight


def forward_cost(x: Tensor, residual: Tensor | None, weight: Tensor, *_: Any) -> OwnedCost:
    """Per element: square, scale, weight (and the addition); per row: a sum of D terms."""
    n = x.numel()
    pointwise = n * (3 + (residual is not None))
    moved = 2 * row_bytes(x) + row_bytes(weight) + (2 * row_bytes(x) if residual is not None else 0)
    return OwnedCost(base=Cost(pointwise=pointwise, reduction=n, bytes=moved))


def backward_cost(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    run_offsets: Any,
    offset: float,
    need: bool,
) -> OwnedCost:
    """Per element: g, its product with h, the two terms of dx (and the sum with dh); one product for dw."""
    n = h.numel()
    base = Cost(
        pointwise=n * (6 + (dh is not None)),
        reduction=n,
        bytes=(3 + (dh is not None)) * row_bytes(h) + row_bytes(weight),
    )
    return OwnedCost(base=base, adapter=Cost(pointwise=n, reduction=n, bytes=4 * weight.numel()) if need else Cost())


FORWARD = primitive(
    "rms_norm(Tensor x, Tensor? residual, Tensor weight, int[] run_offsets, float eps, float offset, int spare)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_forward,
    shape=_forward_shape,
    cost=forward_cost,
    **cpu.implementations("rms_norm"),
    **triton.implementations("rms_norm"),
)
BACKWARD = primitive(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, int[] run_offsets, float offset,"
    " bool need_weight) -> (Tensor, Tensor)",
    reference=reference_backward,
    shape=_backward_shape,
    cost=backward_cost,
    **cpu.implementations("rms_norm_backward"),
    **triton.implementations("rms_norm_backward"),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, options: tuple[Any, ...]) -> Any:
        run_offsets, eps, offset, spare = options
        y, h, rstd = FORWARD(x, residual, weight, run_offsets, eps, offset, spare)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.options = run_offsets, offset
        ctx.set_materialize_grads(False)
        return y, x if residual is None else h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Any:
        assert dy is not None, "the norm's output reaches no loss"
        h, weight, rstd = ctx.saved_tensors
        run_offsets, offset = ctx.options
        dx, dweight = BACKWARD(dy, dh, h, weight, rstd, run_offsets, offset, ctx.needs_input_grad[2])
        return (
            dx,
            (dx if ctx.needs_input_grad[1] else None),
            (dweight if ctx.needs_input_grad[2] else None),
            None,
        )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    run_offsets: Sequence[int] = (),
    spare: int = 0,
) -> tuple[Tensor, Tensor]:
    """Norm of x + residual: (y, the sum h that goes on as the next residual; x itself where there is none).

    `spare` columns are left free to the right of each row of y in memory, for the product that reads it.
    """
    y, h = apply(_RMSNorm, x, residual, weight, (list(run_offsets), eps, offset, spare))
    return y, h
