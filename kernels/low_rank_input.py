"""Norm and gated activation that also make u = drop(y) A^T of the low-rank product which reads their result y.

The product then need not read its input a second time for it. y, h, rstd: see `rms_norm` and `glu`; a and u: see
`lora_linear`. y has at least P = R * (sum of r) spare columns, in which a GPU's kernel leaves u, spread over the runs.
Backward passes are those of the plain operators, for u's gradient is the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import glu as gated
from peftdyno.kernels import lora_linear, rms_norm, triton, tuning
from peftdyno.kernels.adapted_linear import LinearEdits, TokenRuns
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive

MOST_RANKS = 64
"""Sum of a run's ranks up to which a kernel keeps u in registers."""


@dataclass(frozen=True)
class Down:
    """The low-rank terms' first factors, and the dropout of their input."""

    a: tuple[Tensor, ...]
    runs: TokenRuns
    dropout: float
    keys: Tensor | None

    def arguments(self) -> tuple[list[Tensor], list[int], float, Tensor | None, Tensor | None]:
        """As the operators take them."""
        return [t.detach() for t in self.a], list(self.runs.offsets), self.dropout, self.runs.streams, self.keys


def down_of(
    operator: str, rows: Tensor, columns: int, spare: int, edits_of: Callable[[], LinearEdits | None], runs: TokenRuns
) -> Down | None:
    """What the producer of a product's input y [N, columns] is to make of it, or None where the product does so: the
    default, unless `peftdyno tune` measured otherwise.

    `operator` names the producer in `tuning.FORMS`; `rows` has the N and the device of y; `spare` is the room beside y.
    """
    if not spare or tuning.form(operator, (rows.shape[0], columns, spare), rows.device) != "together":
        return None
    edits = edits_of()
    if edits is None or not edits.low_rank:
        return None
    ranks, num_runs = sum(term.a.shape[1] for term in edits.low_rank), len(edits.low_rank[0].scaling)
    if ranks > MOST_RANKS or spare < ranks * num_runs:
        return None
    return Down(tuple(term.a for term in edits.low_rank), runs, edits.dropout, edits.keys)


def reference_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    eps: float,
    offset: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, then the skinny products: y, h, rstd and u."""
    y, h, rstd = rms_norm.reference_forward(x, residual, weight, [], eps, offset, spare)
    return y, h, rstd, lora_linear.reference_down(y, a, run_offsets, dropout, streams, keys)


def reference_glu(
    gate_up: Tensor,
    activation: str,
    a: Sequence[Tensor],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
    spare: int,
) -> tuple[Tensor, Tensor]:
    """The activation, then the skinny products: y and u."""
    y = gated.reference_forward(gate_up, None, activation, [], spare)
    return y, lora_linear.reference_down(y, a, run_offsets, dropout, streams, keys)


def _ranks(a: Sequence[Tensor]) -> int:
    return sum(factor.shape[1] for factor in a)


def _norm_shape(x: Tensor, residual: Tensor | None, weight: Tensor, a: Sequence[Tensor], *rest: Any) -> Any:
    found = rms_norm._forward_shape(x, residual, weight, rest[-1])
    return *found, x.new_empty(x.shape[0], _ranks(a))


def _glu_shape(gate_up: Tensor, activation: str, a: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    y = gated._forward_shape(gate_up, None, activation, (), rest[-1])
    return y, y.new_empty(y.shape[0], _ranks(a))


def _with_down(base: OwnedCost, rows: Tensor, a: Sequence[Tensor], runs: Sequence[int], dropout: float) -> OwnedCost:
    u = rows.shape[0] * _ranks(a) * rows.element_size()
    return OwnedCost(base.base, base.adapter + lora_linear.down_cost(rows, a, runs, dropout) + Cost(bytes=u))


def norm_cost(x: Tensor, residual: Tensor | None, weight: Tensor, a: Sequence[Tensor], *rest: Any) -> OwnedCost:
    """The norm's and, for the adapter, the skinny products' without their reading of y."""
    return _with_down(rms_norm.forward_cost(x, residual, weight), x, a, rest[0], rest[1])


def glu_cost(gate_up: Tensor, activation: str, a: Sequence[Tensor], *rest: Any) -> OwnedCost:
    """The activation's and, for the adapter, the skinny products' without their reading of y."""
    return _with_down(gated.forward_cost(gate_up, None, activation), gate_up, a, rest[0], rest[1])


NORM = primitive(
    "rms_norm_down(Tensor x, Tensor? residual, Tensor weight, Tensor[] a, int[] run_offsets, float dropout,"
    " Tensor? streams, Tensor? keys, float eps, float offset, int spare) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_norm,
    shape=_norm_shape,
    cost=norm_cost,
    **triton.implementations("rms_norm_down"),
)
GLU = primitive(
    "glu_down(Tensor gate_up, str activation, Tensor[] a, int[] run_offsets, float dropout, Tensor? streams,"
    " Tensor? keys, int spare) -> (Tensor, Tensor)",
    reference=reference_glu,
    shape=_glu_shape,
    cost=glu_cost,
    **triton.implementations("glu_down"),
)


class _RMSNormDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, down: Down, options: tuple[float, float, int]
    ) -> Any:
        y, h, rstd, u = NORM(x, residual, weight, *down.arguments(), *options)
        ctx.save_for_backward(x if residual is None else h, weight, rstd)
        ctx.offset = options[1]
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        return y, x if residual is None else h, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Any) -> Any:
        assert dy is not None, "the norm's output reaches no loss"
        h, weight, rstd = ctx.saved_tensors
        dx, _ = rms_norm.BACKWARD(dy, dh, h, weight, rstd, [], ctx.offset, False)
        return dx, (dx if ctx.needs_input_grad[1] else None), None, None, None


class _GLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Down, options: tuple[str, int, int]) -> Any:
        activation, spare, grad_spare = options
        ctx.save_for_backward(gate_up)
        ctx.options = activation, [], grad_spare
        y, u = GLU(gate_up, activation, *down.arguments(), spare)
        ctx.mark_non_differentiable(u)
        return y, u

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        dx, _ = gated.BACKWARD(dy, gate_up, None, *ctx.options)
        return dx, None, None


def rms_norm_down(
    x: Tensor, weight: Tensor, down: Down, *, eps: float, offset: float, residual: Tensor | None, spare: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm` with a frozen weight [D], and u for the product that reads y: (y, h, u)."""
    y, h, u = apply(_RMSNormDown, x, residual, weight, down, (eps, offset, spare))
    return y, h, u


def glu_down(gate_up: Tensor, activation: str, down: Down, *, spare: int, grad_spare: int = 0) -> tuple[Tensor, Tensor]:
    """`glu` without a scale, and u for the product that reads y: (y, u)."""
    y, u = apply(_GLUDown, gate_up, down, (activation, spare, grad_spare))
    return y, u
