"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on a stack of R runs, each with its own rate, clip factor and step.

g' = c_j g;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2;
p = p (1 - lr_j wd) - lr_j (m / (1 - b1^t_j)) / (sqrt(v / (1 - b2^t_j)) + eps).
A run with rate 0 and step 0 is left untouched. p, g, m, v: [R, ...] in fp32; rates, clips: R floats; steps: R ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive

POINTWISE_FLOPS = 15
"""FLOPs a parameter: clip 1, m 3, v 4, decay 1, bias corrections 2, root 1, eps 1, quotient 1, update 1."""


def reference(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rates: Sequence[float],
    clips: Sequence[float],
    steps: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """Plain PyTorch, in place, a run at a time."""
    for j, (rate, clip, step) in enumerate(zip(rates, clips, steps, strict=True)):
        if step == 0:
            continue
        grad = g[j] * clip
        m[j].mul_(beta1).add_(grad, alpha=1 - beta1)
        v[j].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v[j] / (1 - beta2**step)).sqrt_().add_(eps)
        p[j].mul_(1 - rate * decay).addcdiv_(m[j] / (1 - beta1**step), denominator, value=-rate)


def cost(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Any, clips: Any, steps: Sequence[int], *_: Any
) -> OwnedCost:
    """15 FLOPs a parameter of a live run; four arrays read, three written."""
    n = p.numel() // len(steps) * sum(step > 0 for step in steps)
    return OwnedCost(adapter=Cost(pointwise=POINTWISE_FLOPS * n, bytes=28 * n))


def _shape(*_: Any) -> None:
    return None


ADAMW = primitive(
    "adamw_(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, float[] rates, float[] clips, int[] steps,"
    " float beta1, float beta2, float eps, float decay) -> ()",
    reference=reference,
    shape=_shape,
    cost=cost,
    **cpu.implementations("adamw_"),
    **triton.implementations("adamw_"),
)
