"""LM head and cross-entropy at labelled tokens only, in chunks of rows: the logits of one chunk exist at a time.

For label i with hidden state x_i [D], target t_i:  z = x_i W^T (soft-capped by c tanh(z / c));
loss_i = log sum exp z - z_t;  with the frozen head,  dx_i = (softmax(z) - onehot(t)) W.
The gradient is formed while the chunk's logits are there, so the backward pass only scales it by dloss_i.
x: [L, D]; head: [V, D]; targets: [L]; loss: [L] in fp32; gradient: [L, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes

CHUNK_ROWS = 256
"""Rows whose logits are held at once: 25 MB in bf16 at a vocabulary of 49,152."""


def reference(x: Tensor, head: Tensor, targets: Tensor, softcap: float, need_gradient: bool) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, softmax in fp32."""
    loss = x.new_empty(x.shape[0], dtype=torch.float32)
    gradient = torch.empty_like(x) if need_gradient else x.new_empty(0)
    for start in range(0, x.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        z = (x[rows] @ head.t()).float()
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        lse = torch.logsumexp(z, dim=-1)
        target = targets[rows, None]
        loss[rows] = lse - z.gather(1, target).squeeze(1)
        if need_gradient:
            dz = torch.exp(z - lse[:, None])
            dz.scatter_add_(1, target, -torch.ones_like(target, dtype=dz.dtype))
            if softcap:
                dz *= 1 - (z / softcap) ** 2
            gradient[rows] = dz.to(x.dtype) @ head
    return loss, gradient


def _shape(x: Tensor, head: Tensor, targets: Tensor, softcap: float, need: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), (x.new_empty(x.shape) if need else x.new_empty(0))


def cost(x: Tensor, head: Tensor, targets: Tensor, softcap: float, need_gradient: bool) -> OwnedCost:
    """2 L V D for the logits and as much for the gradient; 3 pointwise and 2 reduction FLOPs a logit."""
    (n, d), v = x.shape, head.shape[0]
    chunks = -(-n // CHUNK_ROWS)
    matrix = 2 * n * v * d * (2 if need_gradient else 1)
    moved = row_bytes(x) * (2 if need_gradient else 1) + chunks * row_bytes(head) + 8 * n
    logits = min(n, CHUNK_ROWS) * v
    workspace = logits * (x.element_size() + 4 * (2 if need_gradient else 1))
    return OwnedCost(Cost(matrix, n * v * (3 + need_gradient), 2 * n * v, moved, workspace))


LABEL_LOSS = primitive(
    "label_loss(Tensor x, Tensor head, Tensor targets, float softcap, bool need_gradient) -> (Tensor, Tensor)",
    reference=reference,
    shape=_shape,
    cost=cost,
    **cpu.implementations("label_loss"),
    **triton.implementations("label_loss"),
)


def _scale_cost(gradient: Tensor, dloss: Tensor) -> OwnedCost:
    return OwnedCost(Cost(pointwise=gradient.numel(), bytes=2 * row_bytes(gradient) + row_bytes(dloss)))


SCALE_ROWS = primitive(
    "scale_rows(Tensor x, Tensor factors) -> Tensor",
    reference=lambda x, factors: (x.float() * factors[:, None]).to(x.dtype),
    shape=lambda x, factors: x.new_empty(x.shape),
    cost=_scale_cost,
    **cpu.implementations("scale_rows"),
    **triton.implementations("scale_rows"),
)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        loss, gradient = LABEL_LOSS(x, head, targets, softcap, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return SCALE_ROWS(gradient, dloss), None, None, None


def label_loss(x: Tensor, head: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """Cross-entropy of each label, [L] in fp32, against a frozen head; logits never exist as a whole."""
    loss: Tensor = apply(_LabelLoss, x, head, targets, softcap or 0.0)
    return loss
