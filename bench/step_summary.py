"""StepSummary: all the steps of a training in a few figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftdyno.bench.steps import BETWEEN, whole_lines
from peftdyno.bench.store import Energy
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.work import Work, total_work

WARM_UP = 3
"""Steps at the start that the percentiles leave out, where there are many more."""


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """Seconds in all and by phase, percentiles of one step, peaks of memory, energy where it was measured, tokens
    computed, and the work of all packs with the largest of them."""

    wall: float
    phases: dict[str, float]
    step: dict[str, float]
    memory: dict[str, int]
    energy: Energy | None
    tokens: int
    steps: int
    work: Work
    largest: tuple[PackShape, ...]

    def seconds(self) -> dict[str, float]:
        """For a record's `time`."""
        return {"training": self.wall, **self.phases, **self.step}


def summarise(path: Path) -> StepSummary:
    """Sums and peaks of a file of steps; a line cut short by a kill is left out."""
    lines = whole_lines(path)
    timed = [step for line in lines for step in line["phases"]]
    took = [sum(value for phase, value in step.items() if phase != BETWEEN) for step in timed]
    took = took[WARM_UP:] if len(took) >= 4 * WARM_UP else took
    return StepSummary(
        wall=sum(line["wall"] for line in lines),
        phases=_sums(timed),
        step=_percentiles(took),
        memory=_memory(lines),
        energy=_energy(lines),
        tokens=sum(line["tokens"] for line in lines),
        steps=sum("step" in line for line in lines),
        work=total_work([Work.from_dict(line["work"]) for line in lines]),
        largest=tuple(dict.fromkeys(PackShape.from_dict(pack) for line in lines for pack in line["largest"])),
    )


def _sums(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums by phase, validation under its own name."""
    sums: dict[str, float] = {}
    for part in parts:
        for phase, value in part.items():
            name = "validation" if phase == BETWEEN else phase
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _memory(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The largest of each figure; what was measured between steps is validation's."""
    peaks: dict[str, int] = {}
    for line in lines:
        for name, value in line["memory"].items():
            name = "validation_peak_bytes" if name == "evaluation_peak_bytes" else name
            peaks[name] = max(peaks.get(name, 0), value)
    return peaks


def _energy(lines: Sequence[dict[str, Any]]) -> Energy | None:
    """Joules of all steps; None where any was not measured, or by another counter."""
    found = [line.get("energy", {}) for line in lines]
    sources = [part.get("source") for part in found]
    if not found or None in sources or any(source != sources[0] for source in sources):
        return None
    return Energy(**sources[0], joules=_sums([part["joules"] for part in found]))


def _percentiles(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile; nothing of no values."""
    if len(values) < 2:
        return {"step_median": values[0]} if values else {}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"step_median": statistics.median(values), "step_p10": tenths[0], "step_p90": tenths[-1]}
