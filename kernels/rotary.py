"""Rotary position embedding in place on the query and key heads of a fused qkv row (Su et al. 2021, eq. 34).

For each head, with halves (x1, x2) of the head's columns and a token's angles t:
    x1' = x1 cos t - x2 sin t;   x2' = x2 cos t + x1 sin t.     The inverse (the gradient) turns by -t.
qkv: [N, columns], heads first; cos, sin: [N, head_dim / 2] in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes


def angles(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, [N, head_dim / 2] in fp32."""
    turns = positions.float()[:, None] * inverse_frequencies
    return turns.cos(), turns.sin()


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> None:
    """Plain PyTorch, in place on the first `num_heads` heads of each row."""
    half = cos.shape[1]
    heads = qkv[:, : num_heads * 2 * half].unflatten(1, (num_heads, 2 * half))
    x1, x2 = heads.float().split(half, dim=-1)
    c, s = cos[:, None], (-sin if inverse else sin)[:, None]
    heads.copy_(torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1))


def cost(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> OwnedCost:
    """Three FLOPs an element turned."""
    n = cos.numel() * 2 * num_heads
    return OwnedCost(Cost(pointwise=3 * n, bytes=2 * n * qkv.element_size() + row_bytes(cos, sin)))


def _shape(*_: Any) -> None:
    return None


ROTARY = primitive(
    "rotary_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, bool inverse) -> ()",
    reference=reference,
    shape=_shape,
    cost=cost,
    **cpu.implementations("rotary_"),
    **triton.implementations("rotary_"),
)
