"""A goal: what is aimed at, and how its figure is read from the rows that were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Row]]
"""Section -> name -> row."""


@dataclass(frozen=True)
class Goal:
    """What is aimed at; `figure` reads it from the rows and raises KeyError or TypeError where it was not measured.

    `note` says what the figure rests on, where that differs between machines.
    """

    name: str
    bound: float
    at_most: bool
    unit: str
    figure: Callable[[Rows], float]
    note: Callable[[Rows], str] = lambda rows: ""

    def report(self, rows: Rows) -> dict[str, Any]:
        """The figure and whether it meets the goal; None where a row that it needs is not there."""
        try:
            value: float | None = self.figure(rows)
        except (KeyError, TypeError, ValueError):
            value = None
        met = None if value is None else (value <= self.bound if self.at_most else value >= self.bound)
        aim = f"{'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        note = "" if value is None else self.note(rows)
        return {"goal": self.name, "aim": aim, "figure": value, "met": met, "note": note}


def at_most(name: str, bound: float, unit: str, figure: Callable[[Rows], float]) -> Goal:
    """A goal whose figure should be small."""
    return Goal(name, bound, True, unit, figure)


def at_least(
    name: str, bound: float, unit: str, figure: Callable[[Rows], float], note: Callable[[Rows], str] = lambda rows: ""
) -> Goal:
    """A goal whose figure should be large."""
    return Goal(name, bound, False, unit, figure, note)


def read(section: str, name: str, key: str) -> Callable[[Rows], float]:
    """A figure that stands in a row as it is."""
    return lambda rows: float(rows[section][name][key])


def lines(goals: Sequence[Mapping[str, Any]], *, counts: bool) -> list[str]:
    """A line a goal, ended by met, not met or not measured; no verdict where the run does not count (tiny sizes, no
    GPU)."""
    found = []
    for goal in goals:
        figure = "" if goal["figure"] is None else f"{goal['figure']:.4g}"
        verdict = "not measured" if goal["met"] is None else ("met" if goal["met"] else "not met")
        shown = verdict if counts or goal["met"] is None else ""
        note = f"  ({goal['note']})" if goal["note"] else ""
        found.append(f"  {goal['goal']:<72}{goal['aim']:>18}{figure:>12}  {shown}{note}".rstrip())
    return found
