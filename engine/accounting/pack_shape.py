"""PackShape: all of a pack that a cost depends on, small enough to keep for every step of a training."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Labels, Pack, Segment, attention_layout
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.workspace import attention_gradient_bytes

_FIELDS = ("start", "length", "parent", "run", "position", "keys")


@dataclass(frozen=True)
class PackShape:
    """Segments as a flat table of six integers each; runs, labels and predicting rows as offsets by run."""

    table: bytes
    run_offsets: tuple[int, ...]
    label_offsets: tuple[int, ...]
    row_offsets: tuple[int, ...]
    num_virtual: int

    @classmethod
    def of(cls, pack: Pack) -> PackShape:
        """The shape of a pack."""
        values = array("q", [getattr(segment, name) for segment in pack.segments for name in _FIELDS])
        return cls(
            values.tobytes(),
            pack.runs.offsets,
            pack.labels.run_offsets,
            pack.labels.row_runs.offsets,
            pack.virtual_rows.numel(),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "table": array("q", self.table).tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackShape:
        """Of what `as_dict` gave."""
        offsets = {name: tuple(values[name]) for name in ("run_offsets", "label_offsets", "row_offsets")}
        return cls(table=array("q", values["table"]).tobytes(), num_virtual=values["num_virtual"], **offsets)

    @property
    def num_tokens(self) -> int:
        """Rows, N."""
        return self.run_offsets[-1]

    @property
    def num_labels(self) -> int:
        """Labels, L."""
        return self.label_offsets[-1]

    @property
    def num_label_rows(self) -> int:
        """Distinct rows that predict a label, M."""
        return self.row_offsets[-1]

    def sizes(self, config: DecoderConfig) -> tuple[tuple[int, ...], ...]:
        """By any of these a pack may be the one with the highest peak: tokens and labels, rows that predict, and what
        the gradient of attention holds on the CPU, where threads that share keys sum apart."""
        layout = attention_layout(self.segments())
        shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        held = attention_gradient_bytes(layout.segments, layout.chain, *shape)
        return (self.num_tokens, self.num_labels), (self.num_label_rows,), (held,)

    def segments(self) -> tuple[Segment, ...]:
        """The segments."""
        values = array("q", self.table).tolist()
        rows = [values[i : i + len(_FIELDS)] for i in range(0, len(values), len(_FIELDS))]
        return tuple(Segment(**dict(zip(_FIELDS, row, strict=True))) for row in rows)

    def pack(self) -> Pack:
        """A pack of this shape; its tokens, targets and the rows they predict from are arbitrary."""
        n, labels, rows = self.num_tokens, self.num_labels, self.num_label_rows
        segments = self.segments()
        leaves = {*range(len(segments))} - {segment.parent for segment in segments}
        return Pack(
            tokens=torch.zeros(n, dtype=torch.int64),
            positions=torch.zeros(n, dtype=torch.int64),
            segments=segments,
            runs=TokenRuns(offsets=self.run_offsets, streams=torch.zeros(n, dtype=torch.int64)),
            layout=attention_layout(segments),
            labels=Labels(
                index=torch.zeros(labels, dtype=torch.int64),
                target=torch.zeros(labels, dtype=torch.int64),
                weight=torch.ones(labels),
                run_offsets=self.label_offsets,
                rows=torch.arange(rows),
                place=torch.zeros(labels, dtype=torch.int64),
                row_runs=TokenRuns(offsets=self.row_offsets, streams=torch.zeros(rows, dtype=torch.int64)),
            ),
            leaves=tuple(sorted(leaves)),
            virtual_rows=torch.arange(self.num_virtual),
            virtual_index=torch.zeros(self.num_virtual, dtype=torch.int64),
        )

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each run."""
        return tuple(b - a for a, b in itertools.pairwise(self.run_offsets))


def largest(shapes: Iterable[PackShape], config: DecoderConfig) -> tuple[PackShape, ...]:
    """The largest by each of their sizes."""
    sizes = {shape: shape.sizes(config) for shape in shapes}
    most = [max(sizes, key=lambda s: sizes[s][kind]) for kind in range(3)] if sizes else []
    return tuple(dict.fromkeys(most))
