"""A sweep: methods x tasks x seeds on one model. Seeds of a method and task train together; what is finished is
skipped, what fails is recorded and does not stop the rest."""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peftdyno.bench import machine
from peftdyno.bench.base_model import BaseModel
from peftdyno.bench.data import Loader, load_rows
from peftdyno.bench.job import CLAIM, Job, Places, digest, find_task, is_finished, run_job
from peftdyno.bench.packs_ahead import fits_together, group_size
from peftdyno.bench.progress import Progress
from peftdyno.bench.settings import JobSettings, job_fields, make_settings
from peftdyno.bench.store import FAILURE, SWEEP, finished_record, read_object
from peftdyno.engine.adapters import method_class
from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError, unknown

Together = int | Literal["auto"]
AXES = ("methods", "tasks", "seeds")
GROUPS = "groups"
BASELINES = "baselines"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one task with some of its seeds."""

    settings: JobSettings

    def folder(self, sweep: Path, seed: int) -> Path:
        """Where a run of the cell is kept."""
        return sweep / "runs" / self.settings.method / self.settings.task / f"seed-{seed}"


@dataclass
class Outcome:
    """Runs by what became of them, each as `method task seed N`; failures with their reason."""

    trained: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The grid and its cells, every setting checked before anything runs."""

    folder: Path
    cells: tuple[Cell, ...]
    together: Together = "auto"

    @classmethod
    def plan(cls, folder: Path, values: Mapping[str, Any], together: Together = "auto") -> Sweep:
        """The cells of the grid that `values` span: fields of a job, methods, tasks, seeds, and a section a method.

        Tasks are the outer axis, so that a task's rows are read once. UserError for a wrong name or setting, and
        where the folder holds a sweep of other settings. A larger grid with the same settings goes on there.
        """
        values = dict(values)
        methods, tasks, seeds = (_axis(values, name) for name in AXES)
        sections = {name: values.pop(name) for name in list(values) if isinstance(values[name], Mapping)}
        for name in methods:
            method_class(name)
        for name in values:
            if name not in job_fields():
                raise unknown("setting", name, (*job_fields(), *methods))
        for name in sections:
            if name not in methods:
                raise unknown("section of settings", name, methods)
        cells = []
        for task in tasks:
            for method in methods:
                own = {method: sections[method]} if method in sections else {}
                settings = make_settings({**values, **own, "method": method, "task": task, "seeds": seeds})
                settings.build_method()
                cells.append(Cell(settings=settings))
            find_task(task, cells[-1].settings.tasks_file)
        _write_grid(folder, {**values, **sections}, dict(zip(AXES, (methods, tasks, seeds), strict=True)))
        return cls(folder=folder, cells=tuple(cells), together=together)

    def run(self, base: BaseModel, progress: Progress) -> Outcome:
        """Every cell in turn."""
        outcome = Outcome()
        number = 0
        for _, cells in itertools.groupby(self.cells, key=lambda cell: cell.settings.task):
            load = functools.cache(load_rows)
            for cell in cells:
                number += 1
                progress.say(f"{number}/{len(self.cells)} {cell.settings.method} {cell.settings.task}")
                self._run_cell(cell, base, load, progress, outcome)
        return outcome

    def _run_cell(self, cell: Cell, base: BaseModel, load: Loader, progress: Progress, outcome: Outcome) -> None:
        try:
            job = Job.prepare(cell.settings, load)
            pending = self._pending(cell, job, base, outcome)
            groups = self._groups(cell, pending, job, base)
        except Exception as error:
            self._failed(cell, cell.settings.seeds, error, outcome, progress)
            return
        for seeds in groups:
            try:
                self._run_group(cell, job.with_seeds(seeds), base, progress)
            except Exception as error:
                self._failed(cell, seeds, error, outcome, progress)
            else:
                outcome.trained += [_name(cell, seed) for seed in seeds]

    def _pending(self, cell: Cell, job: Job, base: BaseModel, outcome: Outcome) -> dict[int, str]:
        """Seed -> fingerprint of the runs that are not finished."""
        keys = dict(zip(cell.settings.seeds, job.fingerprints(base), strict=True))
        for seed, key in list(keys.items()):
            if finished_record(cell.folder(self.folder, seed), key) is not None:
                outcome.skipped.append(_name(cell, seed))
                del keys[seed]
        return keys

    def _groups(self, cell: Cell, pending: Mapping[int, str], job: Job, base: BaseModel) -> list[tuple[int, ...]]:
        """Seeds that train together: first the groups that an earlier call left unfinished, then new ones. Both are
        within the memory limit, where there is one."""
        left, groups = dict(pending), []
        for claim in sorted((self.folder / GROUPS).glob(f"*/{CLAIM}")):
            held = read_object(claim)["settings"]
            seeds = tuple(held["seeds"])
            same = held["method"] == cell.settings.method and held["task"] == cell.settings.task
            known = same and claim.parent.name == group_key([left.get(seed, "") for seed in seeds])
            if known and fits_together(job.with_seeds(seeds), base):
                groups.append(seeds)
                left = {seed: key for seed, key in left.items() if seed not in seeds}
        rest = list(left)
        size = group_size(job.with_seeds(rest), base, len(left) if self.together == "auto" else self.together)
        return groups + [tuple(rest[i : i + size]) for i in range(0, len(rest), max(size, 1))]

    def _run_group(self, cell: Cell, job: Job, base: BaseModel, progress: Progress) -> None:
        places = Places(
            runs=tuple(cell.folder(self.folder, seed) for seed in job.settings.seeds),
            work=self.folder / GROUPS / group_key(job.fingerprints(base)),
            baseline=self.folder / BASELINES / f"{job.task.name}-{job.baseline_key(base)[:12]}",
        )
        run_job(job, base, places, progress)

    def _failed(self, cell: Cell, seeds: Sequence[int], error: Exception, outcome: Outcome, progress: Progress) -> None:
        """Note the failure in each run's folder that holds no finished run."""
        reason = str(error) or type(error).__name__
        note = {
            "error": reason,
            "kind": type(error).__name__,
            "command": machine.command(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "traceback": None if isinstance(error, UserError) else traceback.format_exc(),
        }
        for seed in seeds:
            name, folder = _name(cell, seed), cell.folder(self.folder, seed)
            if name in outcome.skipped:
                continue
            outcome.failed[name] = reason
            if not is_finished(folder):
                write_json(folder / FAILURE, note)
        progress.say(f"failed: {cell.settings.method} {cell.settings.task}: {reason}")


def group_key(fingerprints: Sequence[str]) -> str:
    """Name of the folder in which runs of these fingerprints train together."""
    return digest(sorted(fingerprints))[:16]


def _name(cell: Cell, seed: int) -> str:
    return f"{cell.settings.method} {cell.settings.task} seed {seed}"


def _axis(values: dict[str, Any], name: str) -> list[Any]:
    """One axis of the grid: a list, or one text with commas; each value once."""
    given = values.pop(name, None)
    if given is None or given == []:
        raise UserError(f"a sweep needs {name}; give --{name}")
    items = given if isinstance(given, list) else [given]
    parts = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    found = [part.strip() if isinstance(part, str) else part for part in parts]
    if name == "seeds":
        found = [_seed(part) for part in found]
    return list(dict.fromkeys(part for part in found if part != ""))


def _seed(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"seed {value!r} must be a whole number") from None


def _write_grid(folder: Path, settings: Mapping[str, Any], grid: Mapping[str, list[Any]]) -> None:
    """sweep.json: the settings of all runs and the grid so far; UserError where the folder has others."""
    path = folder / SWEEP
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if path.exists():
        held = read_object(path)
        before = held.get("settings", {})
        for name in sorted({*plain, *before}):
            if plain.get(name) != before.get(name) and name not in _free(grid, held):
                raise UserError(
                    f"{folder} holds a sweep with {name} {before.get(name)}, now it is {plain.get(name)}; "
                    "give another --out or the same settings"
                )
        plain = {**before, **plain}
        grid = {name: list(dict.fromkeys([*held["grid"][name], *values])) for name, values in grid.items()}
    write_json(path, {"command": machine.command(), "settings": plain, "grid": dict(grid)})


def _free(grid: Mapping[str, list[Any]], held: Mapping[str, Any]) -> set[str]:
    """Settings that may differ from those the folder's sweep began with: the section of a method that only one of
    the two grids has, and what no result depends on."""
    one, other = set(grid["methods"]), set(held["grid"]["methods"])
    return {"threads", "data", "activations", "memory_limit", *(one ^ other)}
