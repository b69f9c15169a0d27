"""Scale and shift of output columns by vectors of one or R runs (IA3: Liu et al. 2022; BitFit: Zaken et al. 2021).

Columns column:column + C of y [N, out] become y * scale[j] (or y + shift[j]) for the tokens of run j.
Backward:  dscale_j = sum over the run's tokens of dy * y_before;  dshift_j = the sum of dy;  dy_before = dy * scale.
scale, shift: [R, C] in fp32; y_before: [N, C].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes
from peftdyno.kernels.rms_norm import rows_of_runs


def reference_scale(y: Tensor, scale: Tensor, column: int, run_offsets: Sequence[int]) -> None:
    """In place on the columns of y."""
    piece = y[:, column : column + scale.shape[1]]
    piece.copy_(piece.float() * rows_of_runs(scale, run_offsets))


def reference_shift(y: Tensor, shift: Tensor, column: int, run_offsets: Sequence[int]) -> None:
    """In place on the columns of y."""
    piece = y[:, column : column + shift.shape[1]]
    piece.copy_(piece.float() + rows_of_runs(shift, run_offsets))


def reference_column_sums(
    dy: Tensor, before: Tensor | None, column: int, width: int, run_offsets: Sequence[int]
) -> Tensor:
    """[R, width] sums over each run's tokens of dy (times `before` where given), in fp32."""
    products = dy[:, column : column + width].float()
    if before is not None:
        products = products * before.float()
    pieces = [products[a:b].sum(0) for a, b in itertools.pairwise(run_offsets)]
    return torch.stack(pieces)


def _elements(y: Tensor, values: Tensor, *_: Any) -> OwnedCost:
    n = y.shape[0] * values.shape[1]
    return OwnedCost(adapter=Cost(pointwise=n, bytes=2 * n * y.element_size() + row_bytes(values)))


def _sums_cost(dy: Tensor, before: Tensor | None, column: int, width: int, run_offsets: Sequence[int]) -> OwnedCost:
    n = dy.shape[0] * width
    moved = n * dy.element_size() + row_bytes(before) + 4 * width * (len(run_offsets) - 1)
    return OwnedCost(adapter=Cost(pointwise=0 if before is None else n, reduction=n, bytes=moved))


SCALE = primitive(
    "bank_scale_(Tensor(a!) y, Tensor scale, int column, int[] run_offsets) -> ()",
    reference=reference_scale,
    shape=lambda *_: None,
    cost=_elements,
    **cpu.implementations("bank_scale_"),
    **triton.implementations("bank_scale_"),
)
SHIFT = primitive(
    "bank_shift_(Tensor(a!) y, Tensor shift, int column, int[] run_offsets) -> ()",
    reference=reference_shift,
    shape=lambda *_: None,
    cost=_elements,
    **cpu.implementations("bank_shift_"),
    **triton.implementations("bank_shift_"),
)
COLUMN_SUMS = primitive(
    "bank_column_sums(Tensor dy, Tensor? before, int column, int width, int[] run_offsets) -> Tensor",
    reference=reference_column_sums,
    shape=lambda dy, before, column, width, runs: dy.new_empty(len(runs) - 1, width, dtype=torch.float32),
    cost=_sums_cost,
    **cpu.implementations("bank_column_sums"),
    **triton.implementations("bank_column_sums"),
)
