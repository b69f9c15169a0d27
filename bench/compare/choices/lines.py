"""A subject's lines: samples by column, ratios of columns round by round, and all of it as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftdyno.bench.compare.table import line as table_line
from peftdyno.bench.compare.table import spread
from peftdyno.bench.compare.turns import Sample, rates

Values = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table: `cells` has a value a round by column, in one unit. `over` names pairs of columns whose
    ratio is formed round by round."""

    name: str
    what: str
    unit: str
    cells: Mapping[str, Values]
    over: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def ratios(self) -> dict[str, Values]:
        """a / b of each round by "a / b"."""
        return {
            f"{a} / {b}": tuple(x / y for x, y in zip(self.cells[a], self.cells[b], strict=True)) for a, b in self.over
        }

    def record(self) -> dict[str, Any]:
        """Plain values with median, least and most of every column and ratio."""
        return {
            "what": self.what,
            "unit": self.unit,
            "note": self.note,
            "cells": {name: _summary(values) for name, values in self.cells.items()},
            "ratios": {name: _summary(values) for name, values in self.ratios().items()},
        }


def _summary(values: Values) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "values": list(values)}


def rounds(samples: Sequence[Sample], calls: int) -> list[Sample]:
    """Samples of so many calls each, out of those of single calls."""
    pieces = [samples[i : i + calls] for i in range(0, len(samples), calls)]
    return [{name: sum(sample[name] for sample in piece) for name in ("seconds", "units")} for piece in pieces]


def milliseconds(samples: Sequence[Sample]) -> Values:
    """Of one unit of work, a sample each."""
    return tuple(1e3 * sample["seconds"] / sample["units"] for sample in samples)


def giga(samples: Sequence[Sample]) -> Values:
    """10^9 units a second, a sample each."""
    return tuple(rates(list(samples), 1e-9))


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Records of a subject's lines as a Markdown table, notes below it."""
    columns = list(dict.fromkeys(name for found in lines.values() for name in found["cells"]))
    ratios = list(dict.fromkeys(name for found in lines.values() for name in found["ratios"]))
    header = ("what", "unit", *columns, *ratios)
    rows = [table_line(header), table_line(["---"] * len(header))]
    for found in lines.values():
        cells = [_shown(found["cells"], name) for name in columns]
        cells += [_shown(found["ratios"], name, "x") for name in ratios]
        rows.append(table_line([found["what"], found["unit"], *cells]))
    notes = [f"{found['what']}: {found['note']}" for found in lines.values() if found["note"]]
    return "\n".join([*rows, *(["", *notes] if notes else [])])


def _shown(found: Mapping[str, Any], name: str, unit: str = "") -> str:
    return spread(found[name]["values"] if name in found else (), unit)
