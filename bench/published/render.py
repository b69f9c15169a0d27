"""The published tables as plain text, as JSON, and as the page docs/results/published-pscp.md."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..pscp import exponent_grid, rank_stability
from . import corrected_sections as corrected
from . import costs, tables
from . import printed_sections as printed
from .section import Section, Table
from .source import published

WIDTH = 100
COMMAND = "peftdyno pscp --published --page docs/results/published-pscp.md"


PARTS: tuple[Callable[[], Section], ...] = (
    corrected.summary,
    printed.reproduction,
    printed.profiler,
    printed.means,
    printed.parameters,
    corrected.corrections,
    corrected.all_exponents,
    corrected.phases,
    corrected.confidence,
    corrected.limits,
)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_table(table: Table) -> list[str]:
    rule = ["---"] + ["---:"] * (len(table.header) - 1)
    return [_row(table.header), _row(rule), *(_row(row) for row in table.rows)]


def _text_table(table: Table) -> list[str]:
    widths = [max(len(row[i]) for row in (table.header, *table.rows)) for i in range(len(table.header))]
    lines = []
    for row in (table.header, *table.rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _markdown(section: Section) -> list[str]:
    lines = [f"## {section.title}", ""]
    for block in section.blocks:
        lines += [*(_markdown_table(block) if isinstance(block, Table) else [block]), ""]
    return lines


def _text(section: Section) -> list[str]:
    lines = [section.title, "=" * len(section.title), ""]
    for block in section.blocks:
        lines += [*(_text_table(block) if isinstance(block, Table) else textwrap.wrap(block, WIDTH)), ""]
    return lines


def page() -> str:
    """The page in Markdown, ending in a newline."""
    head = [
        "# PSCP as published, reproduced and corrected",
        "",
        "Every figure on this page is computed from the printed inputs by",
        "",
        f"    {COMMAND}",
        "",
        "(`--json` gives the same figures to a program.) Nothing here was measured by this project.",
        "",
    ]
    return (
        "\n".join(head + [line for section in (part() for part in PARTS) for line in _markdown(section)]).rstrip()
        + "\n"
    )


def write_page(path: str | Path) -> None:
    """Writes the Markdown page to `path`, making its folder where there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(), encoding="utf-8")


def text() -> str:
    """The same content as plain text, for a terminal."""
    return "\n".join(line for section in (part() for part in PARTS) for line in _text(section)).rstrip() + "\n"


def _tables_json() -> list[dict[str, Any]]:
    return [
        {
            "exponents": dataclasses.asdict(table.exponents),
            "printed": table.pscp,
            "reproduced": tables.reproduced(table),
            "corrected_merged": tables.corrected(table.exponents, merged=True),
            "corrected_unmerged": tables.corrected(table.exponents, merged=False),
        }
        for table in published().tables
    ]


def _flops_json(method: str) -> dict[str, Any]:
    return {
        f"{phase}/{convention}/{'merged' if merged else 'unmerged'}": {
            "matrix_flop": costs.exact_flop(method, convention, merged=merged, phase=phase),
            "adapter_pointwise_flop": costs.pointwise_flop(method, merged=merged, phase=phase),
        }
        for phase, convention, merged in itertools.product(costs.PHASES, costs.CONVENTIONS, (True, False))
    }


def _method_json(method: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "printed_inputs": dataclasses.asdict(published().printed_inputs(method)),
        "flop": _flops_json(method),
        "profiler_count_tflop": dataclasses.asdict(costs.profiler_count(method)),
    }
    if method in published().scored:
        merged, unmerged = (tables.corrected_inputs(method, merged=merged) for merged in (True, False))
        row |= {
            "corrected_inputs_merged": dataclasses.asdict(merged),
            "corrected_inputs_unmerged": dataclasses.asdict(unmerged),
            "pscp": tables.steps(method),
            "interval_over_datasets": tables.task_interval(method),
        }
    return row


def as_json() -> dict[str, Any]:
    """The same figures as plain dicts and lists, unrounded."""
    inputs = {method: tables.corrected_inputs(method, merged=True) for method in published().scored}
    return {
        "source": published().source,
        "constants": dataclasses.asdict(published().constants),
        "mismatches": [(dataclasses.asdict(e), *rest) for e, *rest in tables.mismatches()],
        "tables": _tables_json(),
        "bitfit": [
            {
                "exponents": dataclasses.asdict(t.exponents),
                "stated": t.pscp,
                "reproduced": tables.reproduced(t),
            }
            for t in published().bitfit
        ],
        "methods": {method: _method_json(method) for method in published().methods},
        "base_flop": _flops_json("base"),
        "rank_changes": {
            "merged": tables.rank_changes(merged=True),
            "unmerged": tables.rank_changes(merged=False),
        },
        "rank_stability": dataclasses.asdict(rank_stability(inputs, exponent_grid(), constants=published().constants)),
    }
