"""Packs of one size: the rows and labels of every run padded to a bucket, so that steps on different packs have the
same shapes.

Padding rows are tokens of the pack itself, in sequences of their own behind a run's rows: nothing that counts sees
them. Padding labels weigh 0, so the gradient that reaches a padding row is exactly zero wherever the model is finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftdyno.engine.graphs import bucket
from peftdyno.engine.pack import Labels, Pack, Segment, attention_layout
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.attention import AttentionLayout

PIECE = 64
"""Rows of one sequence of padding, which sees itself causally: few enough for its attention to cost next to nothing,
enough for long padding to be few sequences."""
LEAST_ROWS, LEAST_LABELS = 64, 16
"""Narrowest buckets of a run: below them, time hardly depends on the number of rows."""


@dataclass(frozen=True, kw_only=True)
class PackSize:
    """Rows and labels of each run that takes part, rows of the attention tables, and virtual tokens."""

    takes_part: tuple[bool, ...]
    rows: int
    labels: int
    segments: int
    links: int
    virtual: int

    @classmethod
    def of(cls, pack: Pack) -> PackSize:
        """The size that a pack is padded to: a function of the pack alone. All runs are as wide as the widest, so that
        packs of many runs come in few sizes."""
        counts, num_labels = _counts(pack.runs.offsets), max(_counts(pack.labels.run_offsets))
        rows, labels = max(LEAST_ROWS, bucket(max(counts))), max(LEAST_LABELS, bucket(num_labels))
        takes_part = tuple(count > 0 for count in counts)
        padding = sum(takes_part) * -(-rows // PIECE)
        return cls(
            takes_part=takes_part,
            rows=rows,
            labels=labels,
            segments=bucket(len(pack.layout.segments)) + padding,
            links=bucket(len(pack.layout.chain)) + padding,
            virtual=pack.virtual_rows.numel(),
        )

    def offsets(self, width: int) -> tuple[int, ...]:
        """Bounds of the runs where each that takes part has so many."""
        return (0, *itertools.accumulate(width * part for part in self.takes_part))


def padded(pack: Pack, size: PackSize) -> Pack:
    """The pack at its size; a pack on the CPU. The losses and gradients of its runs are those of the pack, to the
    rounding of sums and products whose number of rows differs."""
    offsets = size.offsets(size.rows)
    shifts = [new - old for new, old in zip(offsets, pack.runs.offsets, strict=True)]
    moved = torch.cat(
        [torch.arange(a, b) + shift for (a, b), shift in zip(_ranges(pack.runs.offsets), shifts[:-1], strict=True)]
    )
    filler = int(pack.tokens[pack.tokens >= 0][0])
    assert pack.runs.streams is not None, "a pack of sequences has identities"
    streams = _spread(pack.runs.streams, pack.runs.offsets, offsets, 0)
    segments = [replace(s, start=s.start + shifts[s.run]) for s in pack.segments]
    segments += _padding(pack.runs.offsets, offsets)
    return replace(
        pack,
        tokens=_spread(pack.tokens, pack.runs.offsets, offsets, filler),
        positions=_spread(pack.positions, pack.runs.offsets, offsets, 0),
        segments=tuple(segments),
        runs=TokenRuns(offsets=offsets, streams=streams),
        layout=_layout(segments, size),
        labels=_labels(pack.labels, size, moved, filler, streams),
        virtual_rows=moved[pack.virtual_rows],
    )


def _labels(labels: Labels, size: PackSize, moved: Tensor, filler: int, streams: Tensor) -> Labels:
    """Labels at their size; those of padding use the last predicting row of their run, which may be a live one: it
    receives exact zeros from them."""
    bounds, last = size.offsets(size.labels), [stop - 1 for stop in size.offsets(size.rows)[1:]]
    old_rows = labels.row_runs.offsets
    rows = _spread(moved[labels.rows], old_rows, bounds, *last)
    shifts = [new - old for new, old in zip(bounds, old_rows, strict=True)]
    place = torch.cat([labels.place[a:b] + s for (a, b), s in zip(_ranges(labels.run_offsets), shifts, strict=False)])
    place = _spread(place, labels.run_offsets, bounds, *(stop - 1 for stop in bounds[1:]))
    return Labels(
        index=rows[place],
        target=_spread(labels.target, labels.run_offsets, bounds, filler),
        weight=_spread(labels.weight, labels.run_offsets, bounds, 0),
        run_offsets=bounds,
        rows=rows,
        place=place,
        row_runs=TokenRuns(offsets=bounds, streams=streams[rows]),
    )


def _padding(old: Sequence[int], new: Sequence[int]) -> list[Segment]:
    """Sequences of padding behind the rows of each run."""
    found = []
    for run, ((a, b), (start, stop)) in enumerate(zip(_ranges(old), _ranges(new), strict=True)):
        for first in range(start + b - a, stop, PIECE):
            length = min(PIECE, stop - first)
            found.append(Segment(start=first, length=length, parent=-1, run=run, position=0))
    return found


def _layout(segments: Sequence[Segment], size: PackSize) -> AttentionLayout:
    """The tables of the segments; rows left over are segments without queries."""
    layout = attention_layout(segments)
    table = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32).repeat(size.segments, 1)
    chain = torch.zeros(size.links, 3, dtype=torch.int32)
    table[: len(layout.segments)], chain[: len(layout.chain)] = layout.segments, layout.chain
    return AttentionLayout(table, chain)


def _spread(values: Tensor, old: Sequence[int], new: Sequence[int], *fill: float) -> Tensor:
    """Values of each run at the beginning of its wider range, and `fill` (one for all, or one for each run) behind."""
    fills = fill * (len(new) - 1) if len(fill) == 1 else fill
    parts = []
    for (a, b), (start, stop), value in zip(_ranges(old), _ranges(new), fills, strict=True):
        parts += [values[a:b], values.new_full((stop - start - (b - a),), value)]
    return torch.cat(parts)


def _ranges(offsets: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets))


def _counts(offsets: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(offsets)]
