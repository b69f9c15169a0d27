"""Low-rank terms added to a product that was made without them, as one with a weight in 4 bits is.

y_m += s_mj drop(x) A_mj^T B_mj^T on each module's rows of W; backward the low-rank part of `lora_linear`'s, with dx
added to. Shapes and names: see `lora_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peftdyno.kernels import lora_linear, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes


def reference_add(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    rows: Sequence[int],
    run_offsets: Sequence[int],
    dropout: float,
    streams: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    """Plain PyTorch: two skinny products a module and run; u."""
    u = lora_linear.reference_down(x, a, run_offsets, dropout, streams, keys)
    lora_linear.add_up(y, u, b, scaling, rows, run_offsets)
    return u


def forward_cost(y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any) -> OwnedCost:
    """2 N r (in + out) a module, an addition an output, dropout 2 an input element; y is read and written again."""
    runs, dropout = rest[2], rest[3]
    down = lora_linear.down_cost(x, a, runs, dropout)
    tokens = runs[-1] - runs[0]
    matrix = sum(2 * tokens * factor.shape[1] * factor.shape[2] for factor in b)
    pointwise = sum(tokens * factor.shape[1] for factor in b)
    moved = row_bytes(x, *b) + sum(2 * tokens * factor.shape[1] * y.element_size() for factor in b)
    return OwnedCost(adapter=down + Cost(matrix=matrix, pointwise=pointwise, bytes=moved))


def backward_cost(
    dx: Tensor, dy: Tensor, x: Tensor, u: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> OwnedCost:
    """The adapter's part of `lora_linear_backward`, with dy read and dx read and written again."""
    runs, dropout, need_x = rest[2], rest[3], rest[-1]
    moved = row_bytes(dy, x) + (2 * row_bytes(dx) if need_x else 0)
    return OwnedCost(adapter=lora_linear.terms_backward_cost(u, a, b, runs, dropout, need_x) + Cost(bytes=moved))


def _gradients(dx: Tensor, dy: Tensor, x: Tensor, u: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *_: Any) -> Any:
    return [t.new_empty(t.shape) for t in a], [t.new_empty(t.shape) for t in b]


ADD = primitive(
    "lora_terms_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float[] scaling, int[] rows, int[] run_offsets,"
    " float dropout, Tensor? streams, Tensor? keys) -> Tensor",
    reference=reference_add,
    shape=lambda y, x, a, *rest: x.new_empty(x.shape[0], sum(factor.shape[1] for factor in a)),
    cost=forward_cost,
    **triton.implementations("lora_terms_"),
)
BACKWARD = primitive(
    "lora_terms_backward_(Tensor(a!) dx, Tensor dy, Tensor x, Tensor u, Tensor[] a, Tensor[] b, float[] scaling,"
    " int[] rows, int[] run_offsets, float dropout, Tensor? streams, Tensor? keys, bool need_x)"
    " -> (Tensor[], Tensor[])",
    reference=lora_linear.add_backward,
    shape=_gradients,
    cost=backward_cost,
    **triton.implementations("lora_terms_backward_"),
)
