"""A frozen product with the edits of a bank: low-rank terms, output scales and shifts, one autograd function.

y = (x W^T + b + sum of low-rank terms) * scale + shift, each on its own rows of W (columns of y).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import bank_affine, linear, lora_linear, lora_terms, nf4_linear
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.nf4 import Nf4Weight, Weight, dense


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Low-rank term on rows start:stop of W. a [R, r, in], b [R, out, r] in fp32; a scale for each run."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A scale or shift [R, C] in fp32 on output columns start:start + C."""

    start: int
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class LinearEdits:
    """All that a bank does at one product. Dropout acts on the input of the low-rank terms; `keys` is [M, R]."""

    low_rank: tuple[LowRank, ...] = ()
    scales: tuple[Columns, ...] = ()
    shifts: tuple[Columns, ...] = ()
    dropout: float = 0.0
    keys: Tensor | None = None

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Every A, then every B, scale and shift."""
        a, b = [term.a for term in self.low_rank], [term.b for term in self.low_rank]
        return (*a, *b, *(scale.values for scale in self.scales), *(shift.values for shift in self.shifts))

    @cached_property
    def gradients(self) -> tuple[Tensor, ...]:
        """Where the parameters' gradients are added, if all of them have a place already, as a bank's do; else empty.

        Adding to them in the backward pass of the product spares autograd a node for each parameter.
        """
        places = tuple(p.grad for p in self.parameters if p.is_leaf and p.grad is not None)
        return places if len(places) == len(self.parameters) else ()

    @cached_property
    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Every A and every B, apart from the graph."""
        return [term.a.detach() for term in self.low_rank], [term.b.detach() for term in self.low_rank]

    @cached_property
    def places(self) -> tuple[list[float], list[int]]:
        """The scaling of each term and run and the rows of each term, as the operators take them."""
        rows = [i for term in self.low_rank for i in (term.start, term.stop)]
        return [s for term in self.low_rank for s in term.scaling], rows

    def dropped(self, dropout: float, keys: Tensor) -> LinearEdits:
        """The same with dropout; what was derived from the terms is kept."""
        _ = self.gradients, self.factors, self.places
        edits = object.__new__(LinearEdits)
        edits.__dict__.update(self.__dict__, dropout=dropout, keys=keys)
        return edits


@dataclass(frozen=True, kw_only=True)
class TokenRuns:
    """Whose each token is: run j owns rows offsets[j]:offsets[j + 1]; streams [N] are the tokens' identities."""

    offsets: tuple[int, ...]
    streams: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each run, R views of x [N, ...]."""
        pieces: tuple[Tensor, ...] = x.split([b - a for a, b in itertools.pairwise(self.offsets)])
        return pieces


@dataclass(frozen=True)
class Plan:
    """What is done at one product, and the room beside its operands; see `adapted_linear`."""

    edits: LinearEdits
    runs: TokenRuns
    x_spare: int
    border: int
    spare: int
    u: Tensor | None = None

    def terms(self) -> tuple[list[float], list[int], list[int], float, Tensor | None, Tensor | None]:
        edits = self.edits
        return *edits.places, list(self.runs.offsets), edits.dropout, self.runs.streams, edits.keys


def product(x: Tensor, weight: Weight, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The frozen product with its low-rank terms, and u of these."""
    a, b = plan.edits.factors
    if plan.u is not None:
        scaling, rows, *_ = plan.terms()
        places = (scaling, rows, list(plan.runs.offsets), plan.x_spare, plan.border, plan.spare)
        return lora_linear.UP(x, plan.u, dense(weight), bias, b, *places), plan.u
    if a and isinstance(weight, Nf4Weight) and nf4_linear.fused("nf4_linear", x, weight):
        y = nf4_linear.product(x, weight, bias, plan.spare)
        return y, lora_terms.ADD(y, x, a, b, *plan.terms())
    if a:
        terms = (a, b, *plan.terms(), plan.x_spare, plan.border, plan.spare)
        y, u = lora_linear.FORWARD(x, dense(weight), bias, *terms)
        return y, u
    return linear.product(x, weight, bias, plan.spare), None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, plan: Plan, *told: Tensor | None) -> Tensor:
        edits, runs = plan.edits, list(plan.runs.offsets)
        y, u = product(x, weight, bias, plan)
        before = []
        for scale in edits.scales:
            before.append(y[:, scale.start : scale.start + scale.values.shape[1]].clone())
            bank_affine.SCALE(y, scale.values, scale.start, runs)
        for shift in edits.shifts:
            bank_affine.SHIFT(y, shift.values, shift.start, runs)
        ctx.plan, ctx.weight = plan, weight
        ctx.save_for_backward(x if edits.low_rank else None, u, *before)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        plan: Plan = ctx.plan
        edits, runs = plan.edits, list(plan.runs.offsets)
        x, u, *before = ctx.saved_tensors
        shifts = [bank_affine.COLUMN_SUMS(dy, None, s.start, s.values.shape[1], runs) for s in edits.shifts]
        scales = [
            bank_affine.COLUMN_SUMS(dy, pre, s.start, s.values.shape[1], runs)
            for s, pre in zip(edits.scales, before, strict=True)
        ]
        if edits.scales:
            dy = dy.clone()
            for scale in edits.scales:
                bank_affine.SCALE(dy, scale.values, scale.start, runs)
        need_x = ctx.needs_input_grad[0]
        a, b = edits.factors
        if not a:
            dx = linear.product_backward(dy, ctx.weight) if need_x else None
            return dx, None, None, None, *given(edits, [*scales, *shifts])
        if isinstance(ctx.weight, Nf4Weight) and nf4_linear.fused("nf4_linear_backward", dy, ctx.weight):
            dx = nf4_linear.product_backward(dy, ctx.weight) if need_x else dy.new_empty(0)
            da, db = lora_terms.BACKWARD(dx, dy, x, u, a, b, *plan.terms(), need_x)
        else:
            weight = dense(ctx.weight)
            dx, da, db = lora_linear.BACKWARD(dy, x, u, weight, a, b, *plan.terms(), plan.border, need_x)
        return (dx if need_x else None), None, None, None, *given(edits, [*da, *db, *scales, *shifts])


def given(edits: LinearEdits, gradients: list[Tensor]) -> list[Tensor | None]:
    """What autograd is given of the parameters' gradients: nothing where they are added in place (`anchor`)."""
    if not edits.gradients:
        return [*gradients]
    for total, gradient in zip(edits.gradients, gradients, strict=True):
        total.add_(gradient)
    return [None]


def anchor(x: Tensor, edits: LinearEdits) -> tuple[Tensor | None, ...]:
    """The parameters that autograd is told of: all of them, or, where their gradients are added in place, one, and it
    only where nothing else makes the product a node of the graph."""
    if not edits.gradients:
        return edits.parameters
    return (None if x.requires_grad else edits.parameters[0],)


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    edits: LinearEdits | None,
    runs: TokenRuns,
    *,
    x_spare: int = 0,
    border: int = 0,
    spare: int = 0,
    u: Tensor | None = None,
) -> Tensor:
    """Product with a frozen weight and a bank's edits of it; plain where `edits` is None.

    `x_spare` says how many columns lie free to the right of each row of x, `border` how many spare columns and
    rows surround the weight in memory (a weight in 4 bits has none), `spare` how many columns to leave free beside the
    output. `u` is what the producer of x has made of it for the low-rank terms, if it has (see `low_rank_input`).
    """
    if edits is None:
        return linear.linear(x, weight, bias, spare=spare)
    plan = Plan(edits, runs, x_spare, border if isinstance(weight, Tensor) else 0, spare, u)
    y: Tensor = apply(_AdaptedLinear, x, weight, bias, plan, *anchor(x, edits))
    return y
