"""Runs of a sweep beside the grid that was asked for: what is there, and what is missing and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftdyno.bench.store import FAILURE, SWEEP, RunRecord, find_records, read_object
from peftdyno.engine.errors import UserError, unknown

Key = tuple[str, str, int]
"""(method, task, seed)."""


@dataclass(frozen=True)
class Missing:
    """A run of the grid without a record."""

    method: str
    task: str
    seed: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Finished runs of one model by (method, task, seed); the grid's axes; what is missing."""

    model: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[Key, RunRecord]
    places: dict[Key, str]
    """Run -> its folder below the sweep."""
    missing: tuple[Missing, ...]

    def common_tasks(self) -> tuple[str, ...]:
        """Tasks on which every method with a finished run has finished every seed: only these enter a mean, so that
        all methods are averaged over the same tasks."""
        present = {method for method, _, _ in self.runs}
        return tuple(
            task for task in self.tasks if all((m, task, seed) in self.runs for m in present for seed in self.seeds)
        )


def collect(
    folder: Path, methods: Sequence[str] = (), tasks: Sequence[str] = (), model: str | None = None
) -> Collection:
    """Every run below a folder, or those of some methods and tasks; UserError where there is none, where runs are of
    several models, and where two have the same method, task and seed."""
    runs, places = _records(folder, model)
    grid = _grid(folder, runs)
    for name, chosen, known in (("method", methods, grid["methods"]), ("task", tasks, grid["tasks"])):
        for item in chosen:
            if item not in known:
                raise unknown(f"{name} of {folder}", item, map(str, known))
    kept_methods = [m for m in grid["methods"] if not methods or m in methods]
    kept_tasks = [t for t in grid["tasks"] if not tasks or t in tasks]
    wanted = [(m, t, s) for m in kept_methods for t in kept_tasks for s in grid["seeds"]]
    return Collection(
        model=next(iter(runs.values())).model["name"],
        methods=tuple(kept_methods),
        tasks=tuple(kept_tasks),
        seeds=tuple(grid["seeds"]),
        runs={key: runs[key] for key in wanted if key in runs},
        places={key: places[key] for key in wanted if key in runs},
        missing=tuple(Missing(*key, _reason(folder, key)) for key in wanted if key not in runs),
    )


def _records(folder: Path, model: str | None) -> tuple[dict[Key, RunRecord], dict[Key, str]]:
    every = [(path, record) for path, record in find_records(folder) if model in (None, record.model["name"])]
    scored = [(path, record) for path, record in every if record.scores is not None]
    models = sorted({record.model["name"] for _, record in scored})
    if len(models) > 1:
        raise UserError(f"{folder} has runs of {len(models)} models; choose with --model: {', '.join(models)}")
    if not scored:
        more = f" ({len(every)} trained without being scored)" if every else ""
        raise UserError(f"{folder} has no finished run{'' if model is None else f' of {model}'}{more}")
    runs: dict[Key, RunRecord] = {}
    places: dict[Key, str] = {}
    for path, record in scored:
        key = (record.method["name"], record.task["name"], record.seed)
        if key in runs:
            raise UserError(
                f"{folder / places[key]} and {path} are both {key[0]} on {key[1]} with seed {key[2]}; "
                "report them from folders of their own"
            )
        runs[key], places[key] = record, str(path.relative_to(folder))
    return runs, places


def _grid(folder: Path, runs: dict[Key, RunRecord]) -> dict[str, list]:
    """The axes: those of sweep.json, and whatever else was found."""
    path = folder / SWEEP
    asked = read_object(path)["grid"] if path.exists() else {}
    found = {name: [key[i] for key in runs] for i, name in enumerate(("methods", "tasks", "seeds"))}
    return {name: list(dict.fromkeys([*asked.get(name, []), *values])) for name, values in found.items()}


def _reason(folder: Path, key: Key) -> str:
    path = folder / "runs" / key[0] / key[1] / f"seed-{key[2]}" / FAILURE
    return str(read_object(path).get("error")) if path.exists() else "not run"
