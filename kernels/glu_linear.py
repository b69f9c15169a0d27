"""Gated activation and the adapted product that reads it, as one: y = (f(gate) * up) W^T + s drop(inner) A^T B^T.

The product's input, inner = f(gate) * up, is not kept for the backward pass: one operator draws it again from gate_up
while it makes what gate_up's gradient needs anyway, and dropout's mask once for both of its uses:
  dA = kept (du^T mask inner);  dinner = dy W + kept mask (du A);  dgate_up = that of `glu` for dinner.
Names and shapes: see `glu` and `lora_linear`; one adapted module, on any rows of W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import dispatch, glu, linear, lora_linear, low_rank_input, triton, tuning
from peftdyno.kernels.adapted_linear import LinearEdits, Plan, TokenRuns, anchor, given, product
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare
from peftdyno.kernels.nf4 import Weight

MOST_RANKS = {2: 64, 4: 32}
"""Bytes of an element -> rank up to which a kernel keeps a part of dA in registers."""


def reference_backward(
    dx: Tensor,
    dy: Tensor,
    gate_up: Tensor,
    u: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    activation: str,
    spare: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Plain PyTorch: the gradient of gate_up from dx = dy W and, in fp32, those of every A and B."""
    inner, dx = glu.reference_forward(gate_up, None, activation, [], 0), dx.clone()
    terms = (a, b, scaling, rows, run_offsets, dropout, streams, keys)
    da, db = lora_linear.add_backward(dx, dy, inner, u, *terms, True)
    return glu.reference_backward(dx, gate_up, None, activation, [], spare)[0], da, db


def backward_cost(
    dx: Tensor, dy: Tensor, gate_up: Tensor, u: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> OwnedCost:
    """The activation's; for the adapter the low-rank terms', and inner's product once more."""
    runs, dropout, activation = rest[2], rest[3], rest[6]
    terms = lora_linear.terms_backward_cost(u, a, b, runs, dropout, True)
    once_more = Cost(pointwise=dx.numel(), bytes=row_bytes(dy))
    return OwnedCost(glu.backward_cost(dx, gate_up, None, activation).base, terms + once_more)


def _shape(
    dx: Tensor, dy: Tensor, gate_up: Tensor, u: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dgate_up = with_spare(gate_up.shape[0], gate_up.shape[1], rest[-1], gate_up)
    return dgate_up, [t.new_empty(t.shape) for t in a], [t.new_empty(t.shape) for t in b]


BACKWARD = primitive(
    "glu_lora_backward(Tensor dx, Tensor dy, Tensor gate_up, Tensor u, Tensor[] a, Tensor[] b, float[] scaling,"
    " int[] rows, int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, str activation, int spare)"
    " -> (Tensor, Tensor[], Tensor[])",
    reference=reference_backward,
    shape=_shape,
    cost=backward_cost,
    **triton.implementations("glu_lora_backward"),
)


class _GLULinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        weight: Weight,
        plan: Plan,
        options: tuple[str, int, low_rank_input.Down | None],
        *told: Tensor | None,
    ) -> Tensor:
        activation, grad_spare, down = options
        if down is None:
            inner = glu.FORWARD(gate_up, None, activation, [], plan.x_spare)
        else:
            inner, made = low_rank_input.GLU(gate_up, activation, *down.arguments(), plan.x_spare)
            plan = replace(plan, u=made)
        y, u = product(inner, weight, None, plan)
        ctx.plan, ctx.weight, ctx.options = plan, weight, (activation, grad_spare)
        ctx.save_for_backward(gate_up, u)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate_up, u = ctx.saved_tensors
        edits = ctx.plan.edits
        dx = linear.product_backward(dy, ctx.weight)
        dgate_up, da, db = BACKWARD(dx, dy, gate_up, u, *edits.factors, *ctx.plan.terms(), *ctx.options)
        return dgate_up, None, None, None, *given(edits, [*da, *db])


def joined(gate_up: Tensor, edits_of: Callable[[], LinearEdits | None]) -> LinearEdits | None:
    """The product's edits where the activation of gate_up and the product are one, else None.

    They are where kernels make a gradient of one low-rank term and nothing else is edited, unless `peftdyno tune`
    measured that apart they are faster.
    """
    device, choice = dispatch.meant(gate_up.device), dispatch.current()
    if choice == "reference" or (device.type != "cuda" and choice != "triton"):
        return None
    edits = edits_of() if gate_up.requires_grad and torch.is_grad_enabled() else None
    if edits is None or len(edits.low_rank) != 1 or edits.scales or edits.shifts:
        return None
    rank, width = edits.low_rank[0].a.shape[1:]
    form = tuning.form("glu_lora_backward", (gate_up.shape[0], width, rank), gate_up.device)
    return edits if form == "together" and rank <= MOST_RANKS[gate_up.element_size()] else None


def glu_linear(
    gate_up: Tensor,
    activation: str,
    weight: Weight,
    edits: LinearEdits,
    runs: TokenRuns,
    *,
    border: int = 0,
    grad_spare: int = 0,
    down: low_rank_input.Down | None = None,
) -> Tensor:
    """`glu`, whose rows have `border` spare columns, and `adapted_linear` of it, where `joined` holds.

    `grad_spare` columns stay free beside each row of gate_up's gradient; with `down` the activation makes u too.
    """
    border = border if isinstance(weight, Tensor) else 0
    plan = Plan(edits, runs, border, border, 0)
    y: Tensor = apply(_GLULinear, gate_up, weight, plan, (activation, grad_spare, down), *anchor(gate_up, edits))
    return y
