"""Pack: a batch without padding, a forest of segments over one flat array of tokens.

A segment has a token range, a parent or none, and a run. A token attends to every token of its segment's ancestors
and to the tokens at or before it in its own segment; positions continue along the path from the root. Segments of a
run lie together, so a run's tokens are one range of rows.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.attention import AttentionLayout
from peftdyno.kernels.transfer import sent

PREFIX_STREAM = 1 << 38
"""Stands for the sequence's ordinal in the token identities of a prefix shared by several sequences."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One example: `tokens`, of which those from `num_prompt` on are labels; `ordinal` is its place in its run's
    effective batch and names its random streams; `weight` multiplies each of its labels' losses."""

    tokens: tuple[int, ...]
    num_prompt: int
    run: int = 0
    ordinal: int = 0
    weight: float = 1.0

    def inputs(self) -> tuple[int, ...]:
        """Tokens that its losses need: not the last of those with labels, which predicts nothing."""
        return self.tokens[:-1] if len(self.tokens) > max(self.num_prompt, 1) else self.tokens


@dataclass(frozen=True, kw_only=True)
class Root:
    """Learned positions in front of every sequence of every run: `tokens` are embedded and pass through the layers,
    `keys` have keys and values in each layer but no queries."""

    kind: Literal["tokens", "keys"]
    length: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows start:start + length of the pack; `position` is the first row's; `parent` a segment's index or -1.
    A segment of keys without queries has length 0 and says in `keys` how many there are."""

    start: int
    length: int
    parent: int
    run: int
    position: int
    keys: int = 0


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Where there is a loss. index, target: int64 [L]; weight: fp32 [L]; run_offsets: labels of run j are
    run_offsets[j]:run_offsets[j + 1]. `rows` are the distinct predicting rows in order, `place` says which of
    them each label uses, `row_runs` divides them by run."""

    index: Tensor
    target: Tensor
    weight: Tensor
    run_offsets: tuple[int, ...]
    rows: Tensor
    place: Tensor
    row_runs: TokenRuns


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The arrays of a batch. tokens (a virtual token is -1), positions: int64 [N]; `virtual_rows` are the rows of
    the virtual tokens and `virtual_index` their places in the bank's [R * length] virtual embeddings."""

    tokens: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    runs: TokenRuns
    layout: AttentionLayout
    labels: Labels
    leaves: tuple[int, ...]
    """Segment of each sequence, in the order given."""
    virtual_rows: Tensor
    virtual_index: Tensor

    @property
    def num_tokens(self) -> int:
        """Rows of the pack, N."""
        return self.tokens.numel()

    @property
    def num_runs(self) -> int:
        """Runs the pack is divided between, R (some may have no tokens)."""
        return len(self.runs.offsets) - 1

    def to(self, device: torch.device | str) -> Pack:
        """Copy with the arrays on `device`; the attention tables stay on the CPU, where kernels read their shapes."""
        names = ("tokens", "positions", "virtual_rows", "virtual_index")
        moved: dict[str, Any] = {n: sent(getattr(self, n), device) for n in names}
        of_labels = ("index", "target", "weight", "rows", "place")
        labels: dict[str, Any] = {n: sent(getattr(self.labels, n), device) for n in of_labels}
        row_runs = _runs_to(self.labels.row_runs, device)
        return replace(
            self,
            **moved,
            runs=_runs_to(self.runs, device),
            labels=replace(self.labels, row_runs=row_runs, **labels),
        )


def _runs_to(runs: TokenRuns, device: torch.device | str) -> TokenRuns:
    return replace(runs, streams=None if runs.streams is None else sent(runs.streams, device))


def shared_prefix_length(rows: SequenceOf[SequenceOf[int]]) -> int:
    """Length of the longest common beginning of two or more rows of tokens that leaves each a token of its own."""
    if len(rows) < 2:
        return 0
    shortest = min(map(len, rows)) - 1
    for length in range(max(shortest, 0)):
        if any(row[length] != rows[0][length] for row in rows):
            return length
    return max(shortest, 0)


class _Builder:
    """Rows and segments as they are appended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.streams: list[int] = []
        self.segments: list[Segment] = []
        self.labels: list[tuple[int, int, float]] = []

    def append(self, tokens: SequenceOf[int], *, parent: int, run: int, ordinal: int, keys: int = 0) -> int:
        above = self.segments[parent] if parent >= 0 else None
        position = 0 if above is None else above.position + max(above.length, above.keys)
        start = len(self.tokens)
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        self.streams += [(ordinal << 24) | (position + i) for i in range(len(tokens))]
        self.segments.append(
            Segment(start=start, length=len(tokens), parent=parent, run=run, position=position, keys=keys)
        )
        return len(self.segments) - 1

    def root(self, root: Root, run: int) -> int:
        if root.kind == "keys":
            return self.append((), parent=-1, run=run, ordinal=PREFIX_STREAM, keys=root.length)
        return self.append([-1] * root.length, parent=-1, run=run, ordinal=PREFIX_STREAM)

    def label(self, sequence: Sequence, leaf: int, shared: int) -> None:
        """Labels of a sequence whose first `shared` tokens lie in the leaf's parent."""
        own, parent = self.segments[leaf], self.segments[leaf].parent
        for t in range(max(sequence.num_prompt, 1), len(sequence.tokens)):
            row = own.start + t - 1 - shared if t > shared else self.segments[parent].start + t - 1
            self.labels.append((row, sequence.tokens[t], sequence.weight))


def build_pack(
    sequences: SequenceOf[Sequence],
    *,
    num_runs: int = 1,
    share_prefix: bool = False,
    root: Root | None = None,
    losses_only: bool = False,
) -> Pack:
    """Lay sequences out run by run; with `share_prefix` a run's common beginning is one segment, parent of the rest.
    With `losses_only` tokens that no loss needs have no rows.

    Raises ValueError for an empty sequence or a run out of range.
    """
    builder, leaves = _Builder(), [-1] * len(sequences)
    offsets, label_offsets = [0], [0]
    for i, sequence in enumerate(sequences):
        if not sequence.tokens or not 0 <= sequence.run < num_runs:
            raise ValueError(f"sequence {i}: {len(sequence.tokens)} tokens, run {sequence.run} of {num_runs}")
    rows = [s.inputs() if losses_only else s.tokens for s in sequences]
    for run in range(num_runs):
        members = [i for i, s in enumerate(sequences) if s.run == run]
        parent = builder.root(root, run) if root is not None and members else -1
        shared = shared_prefix_length([rows[i] for i in members]) if share_prefix else 0
        if shared:
            parent = builder.append(rows[members[0]][:shared], parent=parent, run=run, ordinal=PREFIX_STREAM)
        for i in members:
            leaves[i] = builder.append(rows[i][shared:], parent=parent, run=run, ordinal=sequences[i].ordinal)
            builder.label(sequences[i], leaves[i], shared)
        offsets.append(len(builder.tokens))
        label_offsets.append(len(builder.labels))
    return _finish(builder, tuple(leaves), tuple(offsets), tuple(label_offsets), root)


def _finish(
    builder: _Builder,
    leaves: tuple[int, ...],
    offsets: tuple[int, ...],
    labels: tuple[int, ...],
    root: Root | None,
) -> Pack:
    tokens = torch.tensor(builder.tokens, dtype=torch.int64)
    virtual = torch.nonzero(tokens < 0).flatten()
    root_length = root.length if root is not None else 0
    index = [s.run * root_length + i for s in builder.segments if s.parent < 0 and root_length for i in range(s.length)]
    return Pack(
        tokens=tokens,
        positions=torch.tensor(builder.positions, dtype=torch.int64),
        segments=tuple(builder.segments),
        runs=TokenRuns(offsets=offsets, streams=torch.tensor(builder.streams, dtype=torch.int64)),
        layout=attention_layout(builder.segments),
        labels=_labels(builder, offsets, labels),
        leaves=leaves,
        virtual_rows=virtual,
        virtual_index=torch.tensor(index if virtual.numel() else [], dtype=torch.int64),
    )


def _labels(builder: _Builder, offsets: tuple[int, ...], label_offsets: tuple[int, ...]) -> Labels:
    index = torch.tensor([row for row, _, _ in builder.labels], dtype=torch.int64)
    rows, place = torch.unique(index, return_inverse=True)
    bounds = torch.searchsorted(rows, torch.tensor(offsets))
    streams = torch.tensor(builder.streams, dtype=torch.int64)[rows]
    return Labels(
        index=index,
        target=torch.tensor([target for _, target, _ in builder.labels], dtype=torch.int64),
        weight=torch.tensor([weight for _, _, weight in builder.labels], dtype=torch.float32),
        run_offsets=label_offsets,
        rows=rows,
        place=place,
        row_runs=TokenRuns(offsets=tuple(bounds.tolist()), streams=streams),
    )


def path(segments: SequenceOf[Segment], index: int) -> list[int]:
    """Segments from the root down to `index`."""
    steps = [index]
    while segments[steps[-1]].parent >= 0:
        steps.append(segments[steps[-1]].parent)
    return steps[::-1]


def key_range(segment: Segment, num_rows: int) -> tuple[int, int, int]:
    """(first key row, number of keys, first position) of a segment; keys without queries lie behind all rows."""
    if segment.keys:
        return num_rows + segment.run * segment.keys, segment.keys, segment.position
    return segment.start, segment.length, segment.position


def attention_layout(segments: SequenceOf[Segment]) -> AttentionLayout:
    """The kernel's tables of a forest of segments."""
    num_rows = sum(s.length for s in segments)
    table: list[tuple[int, ...]] = []
    chain: list[tuple[int, int, int]] = []
    for i, segment in enumerate(segments):
        if segment.length == 0:
            continue
        first = len(chain)
        chain += [key_range(segments[j], num_rows) for j in path(segments, i)]
        table.append((segment.start, segment.length, first, len(chain)))
    return AttentionLayout(
        torch.tensor(table, dtype=torch.int32).reshape(-1, 4),
        torch.tensor(chain, dtype=torch.int32).reshape(-1, 3),
    )
