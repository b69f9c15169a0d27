"""The section on our step's own make-up: the matrix products' share of it, and their rate against the ceiling."""

from __future__ import annotations

from statistics import median
from typing import Any

from peftdyno.bench.compare.rows import text_batch
from peftdyno.bench.compare.sides import Sides
from peftdyno.bench.compare.step_sections import DROPOUT, LORA, RATE
from peftdyno.bench.compare.turns import Row

TIME, IDEAL = "seconds", "ceiling_seconds"
SHOWN_SHARE = 0.01
"""Operators with less of the step's time than this are not listed."""


def products(sides: Sides) -> list[Row]:
    """Both sizes of the step."""
    rows = []
    for length in (128, 512):
        batch = text_batch(4, length, sides.classification.train)
        options = {**LORA, "dropout": DROPOUT}
        settings = {"model": sides.model, "method": "lora", "options": options, "learning_rate": RATE}
        sides.ours.open("ours.products", **settings, batches=[batch])
        sides.tell(f"  products of the step, 4 x {length} tokens")
        rows += product_rows(length, sides.ours.call("profile", steps=sides.plan.repeats))
    return rows


def product_rows(length: int, rounds: list[dict[str, Any]]) -> list[Row]:
    """Share of the step's time and share of the ceiling, in percent."""
    totals = [_totals(found["operators"]) for found in rounds]
    shares = [100 * total["seconds"] / found["step_seconds"] for total, found in zip(totals, rounds, strict=True)]
    what = f"matrix products of our step, 4 x {length}"
    rate, top = (median(total["product_flops"] / total[of] / 1e9 for total in totals) for of in (TIME, IDEAL))
    return [
        Row(workload=f"{what}: share of its time", against="-", unit="%", ours=tuple(shares), goal=60.0,
            note=_shares(rounds)),
        Row(
            workload=f"{what}: rate over the ceiling at the same shapes",
            against="-",
            unit="%",
            ours=tuple(100 * total[IDEAL] / total[TIME] for total in totals),
            goal=80.0,
            note=f"{rate:.0f} of {top:.0f} GFLOP/s; {_rates(rounds)}",
        ),
    ]  # fmt: skip


def _totals(operators: dict[str, Any]) -> dict[str, float]:
    """Sums over the operators with products."""
    counted = [operator for operator in operators.values() if operator["product_flops"]]
    return {name: sum(operator[name] for operator in counted) for name in (TIME, IDEAL, "product_flops")}


def _shares(rounds: list[dict[str, Any]]) -> str:
    """Operators by falling share of the step's time."""
    shares = {
        name: median(found["operators"][name][TIME] / found["step_seconds"] for found in rounds)
        for name in rounds[0]["operators"]
    }
    shown = [f"{name} {100 * shares[name]:.0f}" for name in sorted(shares, key=shares.__getitem__, reverse=True)
             if shares[name] > SHOWN_SHARE]  # fmt: skip
    step = median(found["step_seconds"] for found in rounds)
    return f"step {1000 * step:.0f} ms; % by operator: {', '.join(shown)}"


def _rates(rounds: list[dict[str, Any]]) -> str:
    """Operators with products, each against the ceiling at its shapes."""
    names = [name for name, operator in rounds[0]["operators"].items() if operator["product_flops"]]
    rates = {
        name: median(found["operators"][name][IDEAL] / found["operators"][name][TIME] for found in rounds)
        for name in names
    }
    return ", ".join(f"{name} {100 * rate:.0f}%" for name, rate in rates.items())
