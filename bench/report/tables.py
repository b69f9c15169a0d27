"""The tables of a report as texts: what the terminal, Markdown and HTML show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftdyno.bench.report.comparison import Cell, Comparison, Row
from peftdyno.bench.report.three_ways import ThreeWays, caption


@dataclass(frozen=True)
class Table:
    """A title, column names, rows of texts, and what is to be known of it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


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
    over = f"mean and standard deviation over seeds {seeds}" if len(found.seeds) > 1 else f"seed {seeds}"
    return Table(f"Score by task in percent, {over}", header, tuple(rows))


def _cell(cell: Cell | None, seeds: int) -> str:
    if cell is None:
        return "missing"
    text = number(cell.mean) + ("" if cell.deviation is None else f" ± {cell.deviation:.2f}")
    return text if len(cell.scores) == seeds else f"{text} ({len(cell.scores)} of {seeds} seeds)"


def pscp_three_ways(comparison: Comparison) -> Table:
    """PSCP published, corrected and measured, merged and not, with the FLOPs of prefill and of one more token."""
    header = (
        "method",
        "published",
        "corrected",
        "corrected merged",
        "measured here",
        "measured merged",
        "prefill +GFLOP",
        "token +MFLOP",
    )
    rows = [_ways_row(way) for way in comparison.ways]
    about = caption(comparison.collection.model, comparison.tasks)
    return Table("PSCP three ways: published inputs, corrected inputs, measured here", header, tuple(rows), about)


def _ways_row(way: ThreeWays) -> tuple[str, ...]:
    unscored = "not in PEFT-Bench" if way.published is None else "no scores"
    unmerged = "none" if way.mergeable is not False else "cannot be"
    return (
        way.method,
        number(way.published, absent="not in PEFT-Bench"),
        number(way.corrected, absent=unscored),
        number(way.corrected_merged, absent=unscored),
        number(way.measured, absent="none"),
        number(way.measured_merged, absent=unmerged),
        _pair(way.prefill_tflop, way.prefill_tflop_merged, 1e3),
        _pair(way.token_tflop, way.token_tflop_merged, 1e6),
    )


def _pair(unmerged: float | None, merged: float | None, scale: float) -> str:
    """Two figures of one unit; what a method does not have is a dash."""
    if unmerged is None:
        return "not counted"
    return " / ".join("-" if value is None else _short(value * scale) for value in (unmerged, merged))


def _short(value: float) -> str:
    """Four digits, without an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def resources(comparison: Comparison) -> Table:
    """What the methods took and store, and their score by the published rules."""
    header = (
        "method",
        "runs",
        "stored values",
        "seconds a run",
        "peak GB, predicted",
        "measured",
        "predicted / measured",
        "process GB",
        "training TFLOP",
        *(("energy J",) if any(row.costs.joules is not None for row in comparison.rows) else ()),
        "score % by published rules",
    )
    rows = [_resources_row(row, energy="energy J" in header) for row in comparison.rows]
    about = (
        "Peaks are of live tensors in a training step, and of the whole process; training TFLOP are the matrix FLOPs "
        "of all steps of a run, predicted, with causal attention."
    )
    return Table("Resources, and the scores by the published rules", header, tuple(rows), about)


def _resources_row(row: Row, *, energy: bool) -> tuple[str, ...]:
    costs = row.costs
    return (
        row.method,
        str(row.runs),
        f"{row.stored:,}",
        number(row.run_seconds, 0),
        number(costs.predicted_gb, 4, absent="not predicted"),
        number(costs.measured_gb, 4, absent="not measured"),
        number(costs.memory_ratio, 4, absent=""),
        number(costs.resident_gb, 3, absent="not measured"),
        number(costs.training_tflop, 3),
        *((number(costs.joules, 1, absent="not measured"),) if energy else ()),
        number(row.published_score, absent="no number"),
    )


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
    found = (ranking, by_task, pscp_three_ways, resources, runs)
    return [table(comparison) for table in found]
