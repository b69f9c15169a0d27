"""Attention over a forest of segments: grouped queries, ancestors' keys, learned prefixes, sliding window.

For a query at position p and a key at position t on the query's path to the root:  s = scale q.k (soft-capped by
c tanh(s / c)), visible where t <= p and, with a window w, t > p - w;  o = sum softmax(s) v.
q: [Nq, H, d]; k, v: [Nk, K, d]; prefix_k, prefix_v: [P, K, d], keys without queries; out: [Nq, H d];
lse: [H, Nq], the log of the sum of exponentials, in fp32. The backward pass keeps q, k, v, out and lse
(Dao 2023, section 3.1): with D = sum(dout * out), dS = P (dP - D), dq = scale dS k, dk = scale dS^T q, dv = P^T dout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftdyno.kernels import cpu, rotary, triton
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes, with_spare

SOFTMAX_FLOPS = 5
"""Pointwise FLOPs of the softmax on one pair: scale, subtract, exponential, sum's share of the rescale, product."""


@dataclass(frozen=True)
class AttentionLayout:
    """Which queries see which keys; int32 tensors on the CPU.

    segments [S, 4]: first query row, number of query rows, first and last-plus-one row of `chain`.
    chain [C, 3]: first key row, number of keys, position of the first key; the last entry of a segment's chain is
    its own, seen causally with its last key aligned to the last query; the others are seen in full. Key rows at
    Nk and above are rows of the prefix tensors.
    """

    segments: Tensor
    chain: Tensor

    @cached_property
    def device_tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """Copies of the two tables by device, made once."""
        return {}

    def pairs(self, window: int | None = None, *, full: bool = False) -> int:
        """Exact number of attended (query, key) pairs a head; with `full`, of a rectangle for every segment."""
        return attended_pairs(self.segments, self.chain, window or 0, full=full)


def attended_pairs(segments: Tensor, chain: Tensor, window: int = 0, *, full: bool = False) -> int:
    """Number of visible (query, key) pairs of the layout, counted from the positions."""
    total = 0
    links = chain.tolist()
    for _, queries, first, last in segments.tolist():
        own_keys, own_position = links[last - 1][1], links[last - 1][2]
        if full:
            total += queries * sum(link[1] for link in links[first:last])
            continue
        positions = own_position + own_keys - queries + np.arange(queries, dtype=np.int64)
        for _, keys, start in links[first:last]:
            seen = np.clip(positions + 1 - start, 0, keys)
            if window:
                seen -= np.clip(positions + 1 - window - start, 0, keys)
            total += int(seen.sum())
    return total


@dataclass(frozen=True)
class _Piece:
    """One segment: its query rows, its key rows and the visibility of each pair."""

    queries: slice
    keys: Tensor
    visible: Tensor


def _pieces(segments: Tensor, chain: Tensor, window: int, device: torch.device) -> Iterator[_Piece]:
    links = chain.tolist()
    for start, queries, first, last in segments.tolist():
        if queries == 0:
            continue
        own = links[last - 1]
        key_rows = torch.cat([torch.arange(a, a + n) for a, n, _ in links[first:last]])
        key_positions = torch.cat([torch.arange(p, p + n) for _, n, p in links[first:last]])
        positions = own[2] + own[1] - queries + torch.arange(queries)
        gap = positions[:, None] - key_positions
        visible = (gap >= 0) & (gap < window) if window else gap >= 0
        yield _Piece(slice(start, start + queries), key_rows.to(device), visible.to(device))


def _rows(x: Tensor, prefix: Tensor | None, rows: Tensor, groups: int) -> Tensor:
    """The named key rows, repeated for each query head of a group: [H, keys, d] in fp32."""
    source = x if prefix is None else torch.cat([x, prefix.to(x.dtype)])
    return source[rows].float().repeat_interleave(groups, dim=1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    s = scale * (q @ k.transpose(1, 2))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~visible, float("-inf"))


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    segments: Tensor,
    chain: Tensor,
    scale: float,
    window: int,
    softcap: float,
    spare: int,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, a segment at a time with its score matrix in fp32."""
    groups = q.shape[1] // k.shape[1]
    out = with_spare(q.shape[0], q.shape[1] * q.shape[2], spare, q)
    lse = torch.zeros(q.shape[1], q.shape[0], device=q.device)
    for piece in _pieces(segments, chain, window, q.device):
        keys, values = (_rows(x, p, piece.keys, groups) for x, p in ((k, prefix_k), (v, prefix_v)))
        s = _scores(q[piece.queries].float().transpose(0, 1), keys, piece.visible, scale, softcap)
        lse[:, piece.queries] = torch.logsumexp(s, dim=-1)
        o = torch.softmax(s, dim=-1) @ values
        out[piece.queries] = o.transpose(0, 1).flatten(1).to(q.dtype)
    return out, lse


def reference_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    chain: Tensor,
    scale: float,
    window: int,
    softcap: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch: gradient of the fused qkv rows [N, (H + 2K) d] and, in fp32, of the prefix tensors."""
    (n, heads, d), kv = q.shape, k.shape[1]
    groups, extra = heads // kv, 0 if prefix_k is None else prefix_k.shape[0]
    dq = torch.zeros(n, heads, d, device=q.device)
    dk, dv = (torch.zeros(k.shape[0] + extra, kv, d, device=q.device) for _ in range(2))
    for piece in _pieces(segments, chain, window, q.device):
        keys, values = (_rows(x, p, piece.keys, groups) for x, p in ((k, prefix_k), (v, prefix_v)))
        query = q[piece.queries].float().transpose(0, 1)
        grad, o = (t[piece.queries].unflatten(1, (heads, d)).float().transpose(0, 1) for t in (dout, out))
        s = _scores(query, keys, piece.visible, scale, softcap)
        p = torch.exp(s - lse[:, piece.queries, None])
        ds = p * (grad @ values.transpose(1, 2) - (grad * o).sum(-1, keepdim=True))
        if softcap:
            ds = ds * (1 - (s.masked_fill(~piece.visible, 0.0) / softcap) ** 2)
        dq[piece.queries] = scale * (ds @ keys).transpose(0, 1)
        for target, source in ((dk, scale * ds.transpose(1, 2) @ query), (dv, p.transpose(1, 2) @ grad)):
            target.index_add_(0, piece.keys, source.unflatten(0, (kv, groups)).sum(1).transpose(0, 1))
    dqkv = with_spare(n, (heads + 2 * kv) * d, spare, q)
    dqkv.copy_(torch.cat([dq.flatten(1), dk[: k.shape[0]].flatten(1), dv[: k.shape[0]].flatten(1)], dim=1))
    return dqkv, dk[k.shape[0] :], dv[k.shape[0] :]


def _forward_shape(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return with_spare(q.shape[0], q.shape[1] * q.shape[2], rest[-1], q), lse


def _backward_shape(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, *rest: Any) -> Any:
    shape = (0, *k.shape[1:]) if prefix_k is None else prefix_k.shape
    dprefix = [q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    return with_spare(q.shape[0], (q.shape[1] + 2 * k.shape[1]) * q.shape[2], rest[-1], q), *dprefix


def forward_cost(q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, *rest: Any) -> OwnedCost:
    """4 d FLOPs a visible pair and head (two products), the softmax pointwise, two reductions."""
    segments, chain, _, window = rest[:4]
    pairs = attended_pairs(segments, chain, window) * q.shape[1]
    moved = 2 * row_bytes(q) + row_bytes(k, v, prefix_k, prefix_v)
    return OwnedCost(Cost(4 * q.shape[2] * pairs, SOFTMAX_FLOPS * pairs, 2 * pairs, moved))


def backward_cost(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, *rest: Any) -> OwnedCost:
    """10 d FLOPs a visible pair and head (five products), the softmax again, D's product and sum."""
    segments, chain, _, window = rest[2:6]
    pairs = attended_pairs(segments, chain, window) * q.shape[1]
    moved = 4 * row_bytes(q) + 2 * row_bytes(k, v, prefix_k, prefix_v)
    return OwnedCost(Cost(10 * q.shape[2] * pairs, SOFTMAX_FLOPS * pairs + q.numel(), pairs + q.numel(), moved))


FORWARD = primitive(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor segments, Tensor chain,"
    " float scale, int window, float softcap, int spare) -> (Tensor, Tensor)",
    reference=reference_forward,
    shape=_forward_shape,
    cost=forward_cost,
    **cpu.implementations("attention"),
    **triton.implementations("attention"),
)
BACKWARD = primitive(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor out,"
    " Tensor lse, Tensor segments, Tensor chain, float scale, int window, float softcap, int spare)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    shape=_backward_shape,
    cost=backward_cost,
    **cpu.implementations("attention_backward"),
    **triton.implementations("attention_backward"),
)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Heads, widths and the score's options of one layer's attention."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    def heads(self, qkv: Tensor) -> Tensor:
        """View of fused rows as the heads of queries, keys and values: [N, H + 2 K, d]."""
        return qkv.view(len(qkv), self.num_heads + 2 * self.num_key_value_heads, self.head_dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of fused rows as heads: q [N, H, d], k and v [N, K, d]."""
        k = self.num_key_value_heads
        queries, keys, values = self.heads(qkv).split_with_sizes((self.num_heads, k, k), 1)
        return queries, keys, values

    def score_options(self) -> tuple[float, int, float]:
        """(scale, window or 0, softcap or 0) as the operators take them."""
        return self.scale, self.window or 0, self.softcap or 0.0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        cos, sin, layout, shape, spare, grad_spare = options
        qkv = qkv.data  # turned in place below; nothing else has saved these rows, so autograd need not know
        rotated = shape.num_heads + shape.num_key_value_heads
        rotary.ROTARY(qkv, cos, sin, rotated, False)
        out, lse = FORWARD(
            *shape.split(qkv),
            prefix_k,
            prefix_v,
            layout.segments,
            layout.chain,
            *shape.score_options(),
            spare,
        )
        ctx.save_for_backward(qkv, prefix_k, prefix_v, out, lse, cos, sin)
        ctx.options = layout, shape, rotated, grad_spare
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        qkv, prefix_k, prefix_v, out, lse, cos, sin = ctx.saved_tensors
        layout, shape, rotated, spare = ctx.options
        dqkv, dk, dv = BACKWARD(
            dout, *shape.split(qkv), prefix_k, prefix_v, out, lse, layout.segments, layout.chain,
            *shape.score_options(), spare,
        )  # fmt: skip
        rotary.ROTARY(dqkv, cos, sin, rotated, True)
        return dqkv, (None if prefix_k is None else dk), (None if prefix_v is None else dv), None


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, shape: AttentionShape) -> Tensor:
    """The rows with their query and key heads turned, in place, as attention keeps them for its backward pass."""
    rotary.ROTARY(qkv, cos, sin, shape.num_heads + shape.num_key_value_heads, False)
    return qkv


def rotary_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: AttentionLayout,
    shape: AttentionShape,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    spare: int = 0,
    grad_spare: int = 0,
) -> Tensor:
    """Rotary embedding and attention of fused rows [N, (H + 2K) d]; gives [N, H d].

    The rows are turned in place: whoever made them must not read them again. `prefix` holds keys (as they are,
    without rotation) and values of learned prefixes.
    """
    prefix_k, prefix_v = prefix if prefix is not None else (None, None)
    options = (cos, sin, layout, shape, spare, grad_spare)
    out: Tensor = apply(_Attention, qkv, prefix_k, prefix_v, options)
    return out
