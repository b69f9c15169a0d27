"""report.md, report.json and report.html of a comparison; the HTML page needs no other file and no network."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from peftdyno.bench import machine
from peftdyno.bench.report.comparison import Comparison
from peftdyno.bench.report.plots import Bar, Point, bars, points
from peftdyno.bench.report.tables import all_tables
from peftdyno.engine.atomic import whole_file, write_json


def write_pages(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the three files into a folder; their paths."""
    json_path = folder / "report.json"
    write_json(json_path, {"command": machine.command(), **comparison.as_json()})
    paths = [json_path]
    for name in ("report.md", "report.html"):
        with whole_file(folder / name) as temporary:
            temporary.write_text(_render(f"{name}.j2", comparison), encoding="utf-8")
        paths.append(folder / name)
    return paths


def _render(template: str, comparison: Comparison) -> str:
    """A template of this package with the comparison; HTML is escaped, and an unknown name is an error."""
    environment = Environment(
        autoescape=template.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(**_values(comparison))


def _values(comparison: Comparison) -> dict[str, Any]:
    return {
        "model": comparison.collection.model,
        "tables": all_tables(comparison),
        "notes": comparison.notes,
        "plots": plots(comparison),
        "command": machine.command(),
        "commands": sorted({line["command"] for line in comparison.provenance()}),
    }


def plots(comparison: Comparison) -> dict[str, str]:
    """Title -> SVG; a plot whose figures are not there is left out."""
    rows = comparison.rows
    found = {}
    valued = [row for row in rows if row.pscp is not None]
    if valued:
        found["PSCP by method"] = bars([Bar(r.method, r.pscp or 0.0, r.low, r.high) for r in valued], "PSCP")
    scored = [row for row in rows if row.score is not None]
    if scored:
        sizes = [Point(row.method, row.trainable, row.score or 0.0) for row in scored if row.trainable]
        found["Score against trainable parameters"] = points(sizes, "trainable parameters", "score %", logarithmic=True)
    measured = [Point(r.method, r.memory_gb, r.score) for r in rows if r.memory_gb is not None and r.score is not None]
    if measured:
        found["Score against training memory"] = points(measured, "peak training memory, GB", "score %")
    return found
