"""Work: the few sums over packs on which the matrix products of a pass depend, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from peftdyno.engine.accounting.attended import square_pairs, visible_pairs
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Segment

NO_WINDOW = 0
"""Key of the pairs of layers that see everything before them."""


@dataclass(frozen=True)
class Work:
    """Rows computed, rows that predict a label, labels, and (query, key) pairs a head: by sliding window (0 where there
    is none), and of the full square. FLOPs are linear in all of them, so the sums of many packs give those packs'."""

    tokens: int
    label_rows: int
    labels: int
    pairs: Mapping[int, int]
    square: int

    @classmethod
    def of(cls, config: DecoderConfig, shape: PackShape) -> Work:
        """The work of a training pack."""
        return cls.over(config, shape.segments(), shape.num_tokens, shape.num_label_rows, shape.num_labels)

    @classmethod
    def over(
        cls, config: DecoderConfig, segments: Sequence[Segment], tokens: int, label_rows: int = 0, labels: int = 0
    ) -> Work:
        """The work of segments that have so many tokens in all."""
        windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        pairs = {window or NO_WINDOW: visible_pairs(segments, window) for window in windows}
        return cls(tokens, label_rows, labels, pairs, square_pairs(segments))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Work:
        """Of its fields as JSON holds them, where windows are texts."""
        return cls(**{**values, "pairs": {int(window): pairs for window, pairs in values["pairs"].items()}})

    def __add__(self, other: Work) -> Work:
        pairs = {
            window: self.pairs.get(window, 0) + other.pairs.get(window, 0) for window in {**self.pairs, **other.pairs}
        }
        return Work(
            self.tokens + other.tokens,
            self.label_rows + other.label_rows,
            self.labels + other.labels,
            pairs,
            self.square + other.square,
        )


def total_work(works: Sequence[Work]) -> Work:
    """The sum; no work where there is none."""
    return reduce(Work.__add__, works, Work(0, 0, 0, {}, 0))
