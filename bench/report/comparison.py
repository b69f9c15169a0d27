"""Methods compared by score, cost and PSCP; every figure comes out of run records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from peftdyno.bench.pscp import (
    PUBLISHED_CONSTANTS,
    Inputs,
    Uncertainty,
    exponent_grid,
    pscp,
    rank_stability,
    ranks,
    uncertainty,
)
from peftdyno.bench.report.collection import Collection, Missing
from peftdyno.bench.report.costs import Costs, costs_of, mean
from peftdyno.bench.report.three_ways import ThreeWays, three_ways
from peftdyno.bench.store import RunRecord
from peftdyno.engine.errors import UserError

MEMORY_KINDS = {
    "measured_peak_bytes": "peak of live tensors in a step, as the allocator handed them out",
    "resident_peak_bytes": "peak resident set of the process, libraries included",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method's scores on one task in percent, a value a finished seed."""

    method: str
    task: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over two or more seeds, with n - 1."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method. `score` and what follows from it are over the common tasks; None where there are none."""

    method: str
    runs: int
    trainable: int
    stored: int
    score: float | None
    published_score: float | None
    """By the published scoring rules."""
    deviation: float | None
    """Standard deviation over seeds of the mean over tasks."""
    inference_tflop: float | None
    memory_gb: float | None
    memory_kind: str | None
    step_seconds: float | None
    """Median of a step, over the runs that shared it."""
    run_seconds: float
    """Training and scoring of one run, where several were trained together their share."""
    costs: Costs
    pscp: float | None
    low: float | None = None
    high: float | None = None
    rank: int | None = None
    kept_rank: float | None = None
    """Share of exponent settings under which the rank is the same."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that a report says."""

    collection: Collection
    tasks: tuple[str, ...]
    """The common tasks."""
    rows: tuple[Row, ...]
    ways: tuple[ThreeWays, ...]
    """In the order of the rows."""
    cells: dict[tuple[str, str], Cell]
    untuned: dict[str, float]
    """The untuned model's score in percent by task."""
    untuned_mean: float | None
    notes: tuple[str, ...]
    without: tuple[str, ...]
    """Factors that PSCP leaves out because some run did not obtain their input."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, unrounded, with the folder of each run they came from."""
        found = self.collection
        return {
            "model": found.model,
            "methods": list(found.methods),
            "tasks": list(found.tasks),
            "seeds": list(found.seeds),
            "common_tasks": list(self.tasks),
            "rows": [asdict(row) for row in self.rows],
            "three_ways": [asdict(way) for way in self.ways],
            "scores": [
                {**asdict(cell), "mean": cell.mean, "deviation": cell.deviation} for cell in self.cells.values()
            ],
            "untuned": {"by_task": self.untuned, "mean": self.untuned_mean},
            "constants": asdict(PUBLISHED_CONSTANTS),
            "pscp_leaves_out": list(self.without),
            "missing": [asdict(run) for run in found.missing],
            "notes": list(self.notes),
            "runs": self.provenance(),
        }

    def provenance(self) -> list[dict[str, Any]]:
        """Where each figure comes from: a line a run."""
        found = self.collection
        return [
            {
                "method": key[0],
                "task": key[1],
                "seed": key[2],
                "folder": found.places[key],
                "finished": record.finished,
                "commit": None if record.git is None else record.git["commit"],
                "processor": record.machine["processor"],
                "torch": record.versions["torch"],
                "command": record.command,
            }
            for key, record in found.runs.items()
        ]


def compare(found: Collection) -> Comparison:
    """Compare the methods of a collection."""
    tasks = found.common_tasks()
    cells = _cells(found)
    runs = {m: [r for key, r in found.runs.items() if key[0] == m] for m in found.methods}
    without = _left_out([record for some in runs.values() for record in some])
    rows = [_row(found, method, records, tasks, without) for method, records in runs.items() if records]
    rows = _ranked(rows, without)
    untuned = _untuned(found)
    return Comparison(
        collection=found,
        tasks=tasks,
        rows=tuple(rows),
        ways=tuple(_ways(row, runs[row.method], without) for row in rows),
        cells=cells,
        untuned=untuned,
        untuned_mean=statistics.fmean(untuned[t] for t in tasks)
        if tasks and all(t in untuned for t in tasks)
        else None,
        notes=tuple(_notes(found, tasks, rows, without)),
        without=without,
    )


def _cells(found: Collection) -> dict[tuple[str, str], Cell]:
    cells = {}
    for method in found.methods:
        for task in found.tasks:
            records = [found.runs[method, task, seed] for seed in found.seeds if (method, task, seed) in found.runs]
            if records:
                cells[method, task] = Cell(
                    method=method,
                    task=task,
                    seeds=tuple(record.seed for record in records),
                    scores=tuple(100 * _main(record) for record in records),
                )
    return cells


def _main(record: RunRecord) -> float:
    value = record.score()
    assert value is not None, record.fingerprint
    return value


def _left_out(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """PSCP's factors whose input some run lacks: left out for all methods alike."""
    inputs = {"tflop": "inference_tflop_above_base", "memory_gb": "memory_gb"}
    return tuple(name for name, key in inputs.items() if any(getattr(r.pscp_inputs, key) is None for r in records))


def _row(
    found: Collection, method: str, records: list[RunRecord], tasks: Sequence[str], without: tuple[str, ...]
) -> Row:
    first = records[0]
    chosen = [[found.runs[method, task, seed] for seed in found.seeds] for task in tasks]
    memory = mean(records, lambda r: r.pscp_inputs.memory_gb)
    tflop = mean(records, lambda r: r.pscp_inputs.inference_tflop_above_base)
    figure = _pscp(chosen, first.parameters.trainable, tflop, without)
    by_seed = (
        [statistics.fmean(100 * _main(line[i]) for line in chosen) for i in range(len(found.seeds))] if tasks else []
    )
    return Row(
        method=method,
        runs=len(records),
        trainable=first.parameters.trainable,
        stored=first.parameters.stored,
        score=statistics.fmean(by_seed) if by_seed else None,
        published_score=_published_mean(chosen),
        deviation=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        inference_tflop=tflop,
        memory_gb=memory,
        memory_kind=first.pscp_inputs.memory_kind,
        step_seconds=mean(records, lambda r: r.time.get("step_median")),
        run_seconds=statistics.fmean(r.time["training"] / r.runs_together + _scoring(r) for r in records),
        costs=costs_of(records),
        **figure,
    )


def _ways(row: Row, records: Sequence[RunRecord], without: Sequence[str]) -> ThreeWays:
    """PSCP of a row three ways; another inference cost than the unmerged one's with all else alike."""

    def figure(tflop: float | None) -> float | None:
        if row.pscp is None or row.score is None:
            return None
        return _inputs(row, without, tflop).pscp()

    return three_ways(row.method, records, row.pscp, figure)


def _inputs(row: Row, without: Sequence[str], tflop: float | None) -> Inputs:
    """PSCP's inputs of a row at an inference cost; a factor that is left out costs nothing."""
    return Inputs(
        score=row.score or 0.0,
        parameters=row.trainable,
        tflop=0.0 if "tflop" in without else max(tflop or 0.0, 0.0),
        memory_gb=0.0 if "memory_gb" in without else row.memory_gb or 0.0,
    )


def _scoring(record: RunRecord) -> float:
    return record.time.get("evaluation", 0.0) / record.runs_together


def _published_mean(chosen: Sequence[Sequence[RunRecord]]) -> float | None:
    values = [record.score("published") for line in chosen for record in line]
    present = [100 * value for value in values if value is not None]
    return statistics.fmean(present) if values and len(present) == len(values) else None


def _pscp(
    chosen: Sequence[Sequence[RunRecord]], trainable: int, tflop: float | None, without: Sequence[str]
) -> dict[str, Any]:
    """PSCP over tasks x seeds, with its bootstrap interval where something can be resampled."""
    if not chosen:
        return {"pscp": None}
    scores = np.array([[100 * _main(record) for record in line] for line in chosen])
    memory = np.zeros_like(scores)
    if "memory_gb" not in without:
        memory = np.array([[record.pscp_inputs.memory_gb for record in line] for line in chosen], dtype=float)
    extra = 0.0 if "tflop" in without or tflop is None else max(tflop, 0.0)
    over = [name for name, count in zip(("tasks", "seeds"), scores.shape, strict=True) if count > 1]
    if scores.mean() < 0:
        return {"pscp": None}
    if not over or scores.min() < 0:
        return {"pscp": pscp(float(scores.mean()), trainable, extra, float(memory.mean()))}
    found: Uncertainty = uncertainty(scores, memory, trainable, extra, over=over)
    return {"pscp": found.estimate, "low": found.low, "high": found.high}


def _ranked(rows: Sequence[Row], without: Sequence[str]) -> list[Row]:
    """Rows by falling PSCP, then score; with ranks, and how they hold as the exponents vary."""
    valued = {row.method: row for row in rows if row.pscp is not None}
    rank = ranks({name: row.pscp or 0.0 for name, row in valued.items()})
    kept: dict[str, float] = {}
    if len(valued) > 1:
        inputs = {name: _inputs(row, without, row.inference_tflop) for name, row in valued.items()}
        kept = rank_stability(inputs, exponent_grid()).kept
    filled = [replace(row, rank=rank.get(row.method), kept_rank=kept.get(row.method)) for row in rows]
    return sorted(filled, key=lambda row: (-(row.pscp or -1.0), -(row.score or -1.0), row.method))


def _untuned(found: Collection) -> dict[str, float]:
    """The untuned model's score by task; UserError where two records of a task disagree on it."""
    scores: dict[str, float] = {}
    for (method, task, seed), record in found.runs.items():
        value = record.baseline()
        if value is None:
            continue
        if task in scores and abs(scores[task] - 100 * value) > 1e-9:
            raise UserError(
                f"{found.places[method, task, seed]}: the untuned model scored {100 * value:.2f} on {task}, "
                f"elsewhere {scores[task]:.2f}; the runs were not scored alike"
            )
        scores[task] = 100 * value
    return scores


def _notes(found: Collection, tasks: Sequence[str], rows: Sequence[Row], without: Sequence[str]) -> list[str]:
    notes = [f"missing: {_name(run)} ({run.reason})" for run in found.missing]
    dropped = [task for task in found.tasks if task not in tasks]
    if dropped:
        notes.append(f"left out of every mean, as not every method has all seeds there: {', '.join(dropped)}")
    empty = [m for m in found.methods if m not in {row.method for row in rows}]
    if empty:
        notes.append(f"no finished run: {', '.join(empty)}")
    if "tflop" in without:
        notes.append("inference FLOPs above the base model's were not counted: PSCP is without that factor")
    if "memory_gb" in without:
        notes.append("training memory was not measured in every run: PSCP is without that factor")
    else:
        kinds = sorted({MEMORY_KINDS[row.memory_kind] for row in rows if row.memory_kind})
        notes.append(f"training memory: {', '.join(kinds)}, measured")
        if len(kinds) > 1:
            notes.append("the memory figures are of different kinds and cannot be compared")
    heavy = sorted({key[0] for key, r in found.runs.items() if _validation_is_larger(r)})
    if heavy:
        notes.append(f"validation between steps held more memory than a step, and is not in PSCP: {', '.join(heavy)}")
    together = sorted({r.runs_together for r in found.runs.values()} - {1})
    if together and "memory_gb" not in without:
        counts = " or ".join(map(str, together))
        notes.append(
            f"memory of runs trained {counts} together is that of all of them; --together 1 measures one alone"
        )
    if rows and all(row.low is None for row in rows):
        notes.append("one task and one seed: nothing to resample, so no intervals")
    notes += [f"{found.places[key]}: training stopped early: {r.stopped}" for key, r in found.runs.items() if r.stopped]
    machines = {(r.machine["processor"], r.machine["threads"], *r.machine.get("gpus", ())) for r in found.runs.values()}
    if len(machines) > 1:
        notes.append("runs are from different machines or thread counts; their times cannot be compared")
    return notes


def _validation_is_larger(record: RunRecord) -> bool:
    step, validation = record.memory.measured_peak_bytes, record.memory.validation_peak_bytes
    return step is not None and validation is not None and validation > step


def _name(run: Missing) -> str:
    return f"{run.method} {run.task} seed {run.seed}"
