"""The tables of a report as texts: what the terminal, Markdown and HTML show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftdyno.bench.report.comparison import Cell, Comparison, Row


@dataclass(frozen=True)
class Table:
    """A title, column names, rows of texts, and what is to be known of it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: float | None, digits: int = 2, absent: str = "not counted") -> str:
    """A figure, or words where there is none."""
    return absent if value is None else f"{value:.{digits}f}"


def ranking(comparison: Comparison) -> Table:
    """Methods by PSCP, the untuned model last."""
    header = (
        "method",
        "score %",
        "PSCP",
        "95% interval",
        "trainable",
        "+TFLOP at 1 x 512",
        "memory GB",
        "s a step",
        "rank kept",
    )
    rows = [_ranking_row(row) for row in comparison.rows]
    if comparison.untuned_mean is not None:
        rows.append(("untuned", number(comparison.untuned_mean), *[""] * (len(header) - 2)))
    over = f"mean over {', '.join(comparison.tasks)}" if comparison.tasks else "no task on which all methods finished"
    return Table(f"PSCP on {comparison.collection.model}, {over}", header, tuple(rows))


def _ranking_row(row: Row) -> tuple[str, ...]:
    score = number(row.score, absent="none") + ("" if row.deviation is None else f" ± {row.deviation:.2f}")
    return (
        row.method,
        score,
        number(row.pscp, absent="none"),
        "" if row.low is None or row.high is None else f"{row.low:.2f} to {row.high:.2f}",
        f"{row.trainable:,}",
        "not counted" if row.inference_tflop is None else f"{row.inference_tflop:.3g}",
        number(row.memory_gb, 3, absent="not measured"),
        number(row.step_seconds, 3, absent=""),
        "" if row.kept_rank is None else f"{100 * row.kept_rank:.0f}%",
    )


def by_task(comparison: Comparison) -> Table:
    """Scores of each method on each task; seeds that lack are said."""
    found = comparison.collection
    header = ("task", *found.methods, "untuned")
    rows = []
    for task in found.tasks:
        cells = [_cell(comparison.cells.get((method, task)), len(found.seeds)) for method in found.methods]
        rows.append((task, *cells, number(comparison.untuned.get(task), absent="")))
    seeds = ", ".join(map(str, found.seeds))
    return Table(f"Score by task in percent, mean and standard deviation over seeds {seeds}", header, tuple(rows))


def _cell(cell: Cell | None, seeds: int) -> str:
    if cell is None:
        return "missing"
    text = number(cell.mean) + ("" if cell.deviation is None else f" ± {cell.deviation:.2f}")
    return text if len(cell.scores) == seeds else f"{text} ({len(cell.scores)} of {seeds} seeds)"


def resources(comparison: Comparison) -> Table:
    """What the methods took and store, and their score by the published rules."""
    header = ("method", "runs", "stored values", "seconds a run", "score %", "score % by published rules")
    rows = [
        (
            row.method,
            str(row.runs),
            f"{row.stored:,}",
            number(row.run_seconds, 0),
            number(row.score, absent="none"),
            number(row.published_score, absent="no number"),
        )
        for row in comparison.rows
    ]
    return Table("Resources, and the scores by each rule", header, tuple(rows))


def runs(comparison: Comparison) -> Table:
    """Every run with the folder of its record."""
    header = ("method", "task", "seed", "record", "finished", "commit", "machine")
    rows = [
        (
            line["method"],
            line["task"],
            str(line["seed"]),
            f"{line['folder']}/run.json",
            line["finished"],
            (line["commit"] or "")[:10],
            f"{line['processor']}, torch {line['torch']}",
        )
        for line in comparison.provenance()
    ]
    return Table("Where the figures come from", header, tuple(rows))


def all_tables(comparison: Comparison) -> Sequence[Table]:
    """In the order of the page."""
    return ranking(comparison), by_task(comparison), resources(comparison), runs(comparison)
