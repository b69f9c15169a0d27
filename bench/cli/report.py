"""`peftdyno report`: compare the methods of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Compare"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno report SWEEP",
    "peftdyno report SWEEP --methods lora,ia3 --tasks sst2,rte --out compared",
    "peftdyno report SWEEP --json",
)


def command(
    sweep: Annotated[Path, typer.Argument(help="Folder of runs.", metavar="SWEEP")],
    methods: Annotated[str | None, typer.Option("--methods", help="Only these.", metavar="A,B")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Only these.", metavar="A,B")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only runs of this model.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the files; SWEEP by default.")] = None,
    json_output: o.Json = False,
) -> None:
    """Print the PSCP table of a sweep and write report.md, report.json and report.html.

    Every method is averaged over the same tasks; runs that are missing are named, never skipped silently.
    """
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.report import compare, write_pages
    from peftdyno.bench.report.collection import collect

    comparison = compare(collect(sweep, names(methods), names(tasks), model))
    paths = write_pages(comparison, out or sweep)
    if json_output:
        print_json(comparison.as_json())
    else:
        show(comparison, paths)


def names(text: str | None) -> tuple[str, ...]:
    """`a,b` as names."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def show(comparison: Any, paths: list[Path]) -> None:
    """The ranking, the scores by task, and PSCP three ways on the terminal."""
    from peftdyno.bench.cli.console import print_table
    from peftdyno.bench.report.tables import by_task, pscp_three_ways, ranking, resources

    for table in (ranking, by_task):
        print_table(table(comparison).header, table(comparison).rows, title=table(comparison).title)
    for note in comparison.notes:
        print(f"- {note}")
    for table in (resources, pscp_three_ways):
        found = table(comparison)
        print_table(found.header, found.rows, title=found.title)
        print(found.caption)
    print("wrote " + ", ".join(str(path) for path in paths))
