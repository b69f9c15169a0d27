"""The comparison's rows as text: medians with their ranges, the ratio, the goal and whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from peftdyno.bench.compare.turns import Row

HEADER = ("workload", "against", "unit", "ours", "reference", "ratio", "goal", "met")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, and below it the notes and how equal work was seen."""
    lines = [line(HEADER), line(["---"] * len(HEADER))]
    remarks = []
    for number, row in enumerate(rows, start=1):
        lines.append(line([f"{number}. {row.workload}", row.against, row.unit, *_figures(row)]))
        text = "; ".join(filter(None, [_equal(row), row.note]))
        if text:
            remarks.append(f"{number}. {text}")
    return "\n".join([*lines, "", *remarks])


def _figures(row: Row) -> list[str]:
    sign = "≥" if row.better == "higher" else "≤"
    times = "x" if row.reference else ""
    goal = "" if row.goal is None else f"{sign} {row.goal:g}{times}"
    met = {True: "yes", False: "no", None: ""}[row.met]
    return [spread(row.ours), spread(row.reference), spread(row.ratios, "x"), goal, met]


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median [least, most]."""
    if not values:
        return "-"
    middle = f"{_number(statistics.median(values))}{unit}"
    return middle if len(values) == 1 else f"{middle} [{_number(min(values))}, {_number(max(values))}]"


def _number(value: float) -> str:
    """Three significant digits, without an exponent for large values."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _equal(row: Row) -> str:
    check = row.check
    if check is None:
        return ""
    if check["kind"] == "greedy tokens":
        return f"equal work: {check['identical']} of {check['sequences']} answers identical"
    return f"equal work: {check['steps']} steps, {_closest(check, 'loss')}, {_closest(check, 'norm')}"


def _closest(check: Mapping[str, Any], what: str) -> str:
    """The step whose error came closest to its limit."""
    error, limit = max(
        zip(check[f"{what}_errors"], check[f"{what}_limits"], strict=True), key=lambda pair: pair[0] / pair[1]
    )
    return f"{what} within {error:.2g} of fp32's (allowed {limit:.2g})"


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
