"""Numbers of attended pairs of a pack, from positions alone: a token sees as many keys as its position says."""

from __future__ import annotations

from collections.abc import Sequence

from peftdyno.engine.pack import Segment


def visible_pairs(segments: Sequence[Segment], window: int | None) -> int:
    """Sum over tokens of min(position + 1, window): the causal convention."""
    return sum(_ramp(s.position, s.position + s.length, window) for s in segments)


def _ramp(first: int, stop: int, window: int | None) -> int:
    """Sum of min(p + 1, window) for first <= p < stop."""
    if window is None:
        return (stop * (stop + 1) - first * (first + 1)) // 2
    bend = min(max(window, first), stop)
    return (bend * (bend + 1) - first * (first + 1)) // 2 + (stop - bend) * window


def square_pairs(segments: Sequence[Segment]) -> int:
    """Every token against every key of the longest sequence through its segment: the full-square convention."""
    longest = [s.position + s.length + s.keys for s in segments]
    for i in reversed(range(len(segments))):
        parent = segments[i].parent
        if parent >= 0:
            longest[parent] = max(longest[parent], longest[i])
    return sum(s.length * keys for s, keys in zip(segments, longest, strict=True))
