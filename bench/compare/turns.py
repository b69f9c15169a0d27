"""Measuring in turns: A B A B, medians, and ratios pair by pair, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Sample = Mapping[str, float]
"""`seconds` and the `units` of work done in them, and whatever else was measured meanwhile."""
Measure = Callable[[int], Sample]
"""One timed piece of work; its argument counts the rounds from 0."""
Better = Literal["higher", "lower"]


def in_turns(measures: Mapping[str, Measure], repeats: int, warm_ups: int = 1) -> dict[str, list[Sample]]:
    """Samples by name: each round lets every side have one turn; the first `warm_ups` rounds are not kept."""
    assert repeats >= 1, repeats
    samples: dict[str, list[Sample]] = {name: [] for name in measures}
    for turn in range(-warm_ups, repeats):
        for name, measure in measures.items():
            sample = measure(max(turn, 0))
            if turn >= 0:
                samples[name].append(sample)
    return samples


def timed(work: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Sample of a piece of work that returns how many units it did."""
    start = clock()
    units = work()
    return {"seconds": clock() - start, "units": units}


def rates(samples: list[Sample], per: float = 1.0) -> list[float]:
    """Units a second (times `per`, e.g. 3600 for an hour)."""
    return [sample["units"] * per / sample["seconds"] for sample in samples]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: values of both sides, a pair a round. `ratios` are ours / reference, pair by pair;
    `goal` bounds their median, from below where higher is better. Without a reference the goal bounds our value."""

    workload: str
    against: str
    unit: str
    ours: tuple[float, ...]
    reference: tuple[float, ...] = ()
    goal: float | None = None
    better: Better = "higher"
    check: Mapping[str, Any] | None = None
    """How it was seen that both did equal work."""
    note: str = ""
    failed: bool = False
    """Whether the sides did unequal work; the note says how."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """ours / reference of each round."""
        return tuple(a / b for a, b in zip(self.ours, self.reference, strict=True)) if self.reference else ()

    @property
    def result(self) -> float | None:
        """What the goal is held against."""
        values = self.ratios or self.ours
        return statistics.median(values) if values else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None or self.result is None:
            return None
        return self.result >= self.goal if self.better == "higher" else self.result <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """Plain values with medians, for the record."""
        medians = {
            f"{name}_median": statistics.median(values)
            for name, values in (("ours", self.ours), ("reference", self.reference), ("ratio", self.ratios))
            if values
        }
        return {**asdict(self), "ratios": self.ratios, **medians, "met": self.met}


def row_from(record: Mapping[str, Any]) -> Row:
    """A row out of its record."""
    names = ("workload", "against", "unit", "goal", "better", "check", "note")
    samples = {name: tuple(record[name]) for name in ("ours", "reference")}
    return Row(**{name: record[name] for name in names}, **samples, failed=record.get("failed", False))
