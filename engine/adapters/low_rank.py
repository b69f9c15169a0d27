"""Arithmetic on a frozen weight W [out, in] and stacked factors A [R, r, in], B [R, out, r]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scaling: Tensor) -> Tensor:
    """Norms [R, out] of the rows of W + s B A, without that matrix; `squares` [out] are those of W's own norms.

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b^T + s^2 b (A A^T) b^T for a row w of W and b of B; `scaling` is [R].
    """
    num_runs, rank, columns = a.shape
    product = weight @ a.reshape(-1, columns).to(weight.dtype).t()
    crossed = product.to(b.dtype).view(-1, num_runs, rank).transpose(0, 1)
    s = scaling[:, None]
    cross = (crossed * b).sum(-1)
    square = ((b @ (a @ a.transpose(1, 2))) * b).sum(-1)
    return (squares + 2 * s * cross + s * s * square).clamp_min(0).sqrt()


def principal_factors(weight: Tensor, runs: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """A0 [R, r, in] and B0 [R, out, r] with s B0 A0 the best rank-r approximation of W for each run's (r, s), the
    singular values shared evenly (Meng et al. 2024, eq. 2 and 3); the largest r over the runs, the rest zero."""
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    rank = max(r for r, _ in runs)
    a, b = (weight.new_zeros(len(runs), *shape) for shape in ((rank, vt.shape[1]), (u.shape[0], rank)))
    for run, (r, scaling) in enumerate(runs):
        root = (values[:r] / scaling).sqrt()
        a[run, :r], b[run, :, :r] = root[:, None] * vt[:r], u[:, :r] * root
    return a, b
