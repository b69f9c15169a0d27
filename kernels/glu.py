"""Gated activation y = f(gate) * up (* scale), with f SiLU or GELU (Shazeer 2020), scale of one or R runs (IA3).

gate_up: [N, 2F] (gate left, up right); y: [N, F]; scale: [R, F] in fp32. Backward keeps gate_up only and draws
y again from it:  dup = dy s f(g);  dgate = dy s u f'(g);  dscale_j = sum over the run's tokens of dy f(g) u.
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
from peftdyno.kernels.rms_norm import rows_of_runs

ACTIVATION_FLOPS = {"silu": 4, "gelu_tanh": 9}
"""FLOPs of f on one element, exp and tanh counted as one each."""
_DERIVATIVE_FLOPS = {"silu": 4, "gelu_tanh": 10}


def activation_value(gate: Tensor, activation: str) -> Tensor:
    """f of an fp32 tensor."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def activation_derivative(gate: Tensor, activation: str) -> Tensor:
    """f' of an fp32 tensor."""
    if activation == "silu":
        s = torch.sigmoid(gate)
        return s * (1 + gate * (1 - s))
    c, a = (2 / torch.pi) ** 0.5, 0.044715
    gate = gate.clamp(-30, 30)  # beyond, t is 1 or -1, and squares of very large values are not finite
    t = torch.tanh(c * (gate + a * gate**3))
    slope: Tensor = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * c * (1 + 3 * a * gate * gate)
    return slope


def reference_forward(
    gate_up: Tensor, scale: Tensor | None, activation: str, runs: Sequence[int], spare: int
) -> Tensor:
    """Plain PyTorch, computed in fp32."""
    gate, up = gate_up.float().chunk(2, dim=1)
    y = activation_value(gate, activation) * up
    if scale is not None:
        y = y * rows_of_runs(scale, runs)
    out = with_spare(gate_up.shape[0], gate_up.shape[1] // 2, spare, gate_up)
    return out.copy_(y)


def reference_backward(
    dy: Tensor, gate_up: Tensor, scale: Tensor | None, activation: str, runs: Sequence[int], spare: int
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: gradient of gate_up, and of the scale in fp32 (empty without one)."""
    gate, up = gate_up.float().chunk(2, dim=1)
    value, grad = activation_value(gate, activation), dy.float()
    dscale = grad.new_empty(0)
    if scale is not None:
        products = grad * value * up
        dscale = torch.stack([products[a:b].sum(0) for a, b in itertools.pairwise(runs)])
        grad = grad * rows_of_runs(scale, runs)
    out = with_spare(gate_up.shape[0], gate_up.shape[1], spare, gate_up)
    out.copy_(torch.cat([grad * up * activation_derivative(gate, activation), grad * value], dim=1))
    return out, dscale


def forward_cost(gate_up: Tensor, scale: Tensor | None, activation: str, *_: Any) -> OwnedCost:
    """f and one product an output element; one more with a scale."""
    n = gate_up.numel() // 2
    base = Cost(pointwise=n * (ACTIVATION_FLOPS[activation] + 1), bytes=3 * n * gate_up.element_size())
    return OwnedCost(base, Cost() if scale is None else Cost(pointwise=n, bytes=row_bytes(scale)))


def backward_cost(dy: Tensor, gate_up: Tensor, scale: Tensor | None, activation: str, *_: Any) -> OwnedCost:
    """f, f' and three products an element; with a scale three more and a sum."""
    n = dy.numel()
    pointwise = n * (ACTIVATION_FLOPS[activation] + _DERIVATIVE_FLOPS[activation] + 3)
    base = Cost(pointwise=pointwise, bytes=5 * n * dy.element_size())
    return OwnedCost(base, Cost() if scale is None else Cost(pointwise=3 * n, reduction=n, bytes=2 * row_bytes(scale)))


def _forward_shape(gate_up: Tensor, scale: Tensor | None, activation: str, runs: Any, spare: int) -> Tensor:
    return with_spare(gate_up.shape[0], gate_up.shape[1] // 2, spare, gate_up)


def _backward_shape(
    dy: Tensor, gate_up: Tensor, scale: Tensor | None, activation: str, runs: Any, spare: int
) -> tuple[Tensor, Tensor]:
    dscale = dy.new_empty(0 if scale is None else scale.shape, dtype=torch.float32)
    return with_spare(gate_up.shape[0], gate_up.shape[1], spare, gate_up), dscale


FORWARD = primitive(
    "glu(Tensor gate_up, Tensor? scale, str activation, int[] run_offsets, int spare) -> Tensor",
    reference=reference_forward,
    shape=_forward_shape,
    cost=forward_cost,
    **cpu.implementations("glu"),
    **triton.implementations("glu"),
)
BACKWARD = primitive(
    "glu_backward(Tensor dy, Tensor gate_up, Tensor? scale, str activation, int[] run_offsets, int spare)"
    " -> (Tensor, Tensor)",
    reference=reference_backward,
    shape=_backward_shape,
    cost=backward_cost,
    **cpu.implementations("glu_backward"),
    **triton.implementations("glu_backward"),
)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        activation, run_offsets, spare, grad_spare = options
        ctx.save_for_backward(gate_up, scale)
        ctx.options = activation, run_offsets, grad_spare
        y: Tensor = FORWARD(gate_up, scale, activation, run_offsets, spare)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate_up, scale = ctx.saved_tensors
        dx, dscale = BACKWARD(dy, gate_up, scale, *ctx.options)
        return dx, (None if scale is None else dscale), None


def glu(
    gate_up: Tensor,
    activation: str,
    *,
    scale: Tensor | None = None,
    run_offsets: Sequence[int] = (),
    spare: int = 0,
    grad_spare: int = 0,
) -> Tensor:
    """Gated activation; `spare` columns stay free beside each output row, `grad_spare` beside each gradient row."""
    y: Tensor = apply(_GLU, gate_up, scale, (activation, list(run_offsets), spare, grad_spare))
    return y
