"""RMS norm on every query and key head of fused qkv rows (Qwen 3, Gemma 3); values pass unchanged.

qkv: [N, (H + 2K) d]; q_weight, k_weight: [d]. The equations are those of `rms_norm`, a head a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import rms_norm
from peftdyno.kernels.autograd import apply


def _head_rows(x: Tensor, first: int, last: int, d: int) -> Tensor:
    return x[:, first * d : last * d].reshape(-1, d)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        heads: tuple[int, int],
        eps: float,
        offset: float,
    ) -> Tensor:
        d = q_weight.shape[0]
        out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        out[:, sum(heads) * d :] = qkv[:, sum(heads) * d :]
        rstds = []
        for weight, (first, last) in zip((q_weight, k_weight), ((0, heads[0]), (heads[0], sum(heads))), strict=True):
            y, _, rstd = rms_norm.FORWARD(_head_rows(qkv, first, last, d), None, weight, [], eps, offset, 0)
            out[:, first * d : last * d] = y.view(qkv.shape[0], (last - first) * d)
            rstds.append(rstd)
        ctx.save_for_backward(qkv, q_weight, k_weight, *rstds)
        ctx.options = heads, offset
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        qkv, q_weight, k_weight, q_rstd, k_rstd = ctx.saved_tensors
        heads, offset = ctx.options
        d = q_weight.shape[0]
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        dqkv[:, sum(heads) * d :] = dout[:, sum(heads) * d :]
        gradients = []
        pieces = ((0, heads[0], q_weight, q_rstd), (heads[0], sum(heads), k_weight, k_rstd))
        for (first, last, weight, rstd), need in zip(pieces, ctx.needs_input_grad[1:3], strict=True):
            dx, dweight = rms_norm.BACKWARD(
                _head_rows(dout, first, last, d),
                None,
                _head_rows(qkv, first, last, d),
                weight,
                rstd,
                [],
                offset,
                need,
            )
            dqkv[:, first * d : last * d] = dx.view(qkv.shape[0], (last - first) * d)
            gradients.append(dweight if need else None)
        return dqkv, *gradients, None, None, None


def head_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    heads: tuple[int, int],
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """Normed copy of the rows; `heads` is (query heads, key heads)."""
    out: Tensor = apply(_HeadNorm, qkv, q_weight, k_weight, heads, eps, offset)
    return out
