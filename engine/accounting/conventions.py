"""The two conventions of counting attention: over the pairs that are attended, or over the full square.

Under the full-square convention every token meets every key of its own sequence, later ones and those outside a
sliding window too, as a plain implementation with a mask computes it. Where sequences share a segment, its tokens
meet the keys of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from peftdyno.kernels.attention import attended_pairs

Convention = Literal["causal", "full"]

_TABLES = {"attention": (5, 4), "attention_backward": (8, 10)}
"""Operator -> place of `segments` among its arguments, and FLOPs a pair, head and column of its products."""


def full_square_pairs(segments: Tensor, chain: Tensor) -> int:
    """(query, key) pairs a head under the full-square convention."""
    links = chain.tolist()
    longest: dict[int, int] = {}
    table = segments.tolist()
    for _, _, first, last in table:
        keys = sum(link[1] for link in links[first:last])
        for row, count, _ in links[first:last]:
            if count:
                longest[row] = max(longest.get(row, 0), keys)
    return sum(queries * longest[links[last - 1][0]] for _, queries, _, last in table if queries)


def full_square_extra(operator: str, arguments: Sequence[Any]) -> int:
    """Matrix FLOPs that the full-square convention counts above the causal ones in a call of an operator."""
    if operator not in _TABLES:
        return 0
    place, flops = _TABLES[operator]
    segments, chain, window = arguments[place], arguments[place + 1], arguments[place + 3]
    query = arguments[0] if operator == "attention" else arguments[1]
    pairs = full_square_pairs(segments, chain) - attended_pairs(segments, chain, window)
    return flops * int(query.shape[1] * query.shape[2]) * pairs
