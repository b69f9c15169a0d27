"""The section on our step's own make-up: the matrix products' share of it, and their rate against the ceiling."""

from __future__ import annotations

from typing import Any

from peftdyno.bench.compare.rows import text_batch
from peftdyno.bench.compare.sides import Sides
from peftdyno.bench.compare.step_sections import DROPOUT, LORA, RATE
from peftdyno.bench.compare.turns import Row

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


def product_rows(length: int, profile: dict[str, Any]) -> list[Row]:
    """Share of the step's time and share of the ceiling, in percent."""
    operators = profile["operators"]
    with_products = {name: op for name, op in operators.items() if op["product_flops"]}
    seconds = sum(op["seconds"] for op in with_products.values())
    ideal = sum(op["ceiling_seconds"] for op in with_products.values())
    flops = sum(op["product_flops"] for op in with_products.values())
    step = profile["step_seconds"]
    what = f"matrix products of our step, 4 x {length}"
    return [
        Row(
            workload=f"{what}: share of its time",
            against="-",
            unit="%",
            ours=(100 * seconds / step,),
            goal=60.0,
            note=_shares(operators, step),
        ),
        Row(
            workload=f"{what}: rate over the ceiling at the same shapes",
            against="-",
            unit="%",
            ours=(100 * ideal / seconds,),
            goal=80.0,
            note=f"{flops / seconds / 1e9:.0f} of {flops / ideal / 1e9:.0f} GFLOP/s; "
            + ", ".join(_rate(name, op) for name, op in with_products.items()),
        ),
    ]


def _shares(operators: dict[str, Any], step: float) -> str:
    """Operators by falling share of the step's time."""
    ordered = sorted(operators.items(), key=lambda item: -item[1]["seconds"])
    shown = [f"{name} {100 * op['seconds'] / step:.0f}" for name, op in ordered if op["seconds"] > SHOWN_SHARE * step]
    return f"step {1000 * step:.0f} ms; % by operator: {', '.join(shown)}"


def _rate(name: str, op: dict[str, Any]) -> str:
    return f"{name} {100 * op['ceiling_seconds'] / op['seconds']:.0f}%"
