"""Rows of a task, from a folder, the hub or a generator, and their division into splits."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftdyno.bench import row_files
from peftdyno.bench.task import Task
from peftdyno.engine.errors import UserError, first_line

VALIDATION_SHARE = 0.1
TEST_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Source:
    """Where rows came from.

    `sha256` is of the file's bytes, or of the rows as JSON lines where there is no file. `rows`
    counts all usable rows of the split, before any limit; `dropped` those the task cannot use.
    """

    task: str
    split: str
    origin: str
    location: str
    rows: int
    dropped: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)


@dataclass(frozen=True)
class Loaded:
    """Rows of one split and their source."""

    rows: list[dict[str, Any]]
    source: Source


@dataclass(frozen=True)
class Splits:
    """Rows a run trains on, picks its checkpoint by, and is scored on; a source for each."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    sources: dict[str, Source]


def load_rows(task: Task, split: str, data_dir: str | Path | None = None) -> Loaded:
    """All usable rows of one split of the source, each checked to give a prompt and an answer.

    A generated task always comes from its generator; other tasks from `data_dir` where it is given,
    else from the hub. UserError names file, row and column.
    """
    if task.generate is not None:
        numbered, origin, location, digest = _generated(task, split)
    elif data_dir is not None:
        numbered, origin, location, digest = _from_folder(task, split, Path(data_dir))
    else:
        numbered, origin, location, digest = _from_hub(task, split)
    rows = _checked(task, numbered, location)
    if not rows:
        raise UserError(f"{location}: split '{split}' of task '{task.name}' has no usable row ({len(numbered)} in all)")
    dropped = len(numbered) - len(rows)
    return Loaded(rows, Source(task.name, split, origin, location, len(rows), dropped, digest))


Loader = Callable[[Task, str, str | Path | None], Loaded]
"""`load_rows`, or a cached form of it where several seeds share their files."""


def load_test(
    task: Task, data_dir: str | Path | None = None, limit: int | None = None, load: Loader = load_rows
) -> Loaded:
    """Test rows; a limit takes the same random sample of them for every seed."""
    _check_limits(test=limit)
    loaded = load(task, _test_split(task, data_dir), data_dir)
    return Loaded(_sample(loaded.rows, limit, TEST_SAMPLE_SEED), loaded.source)


def splits(
    task: Task,
    data_dir: str | Path | None = None,
    seed: int = 42,
    *,
    train_limit: int | None = None,
    validation_limit: int | None = None,
    test_limit: int | None = None,
    load: Loader = load_rows,
) -> Splits:
    """Train, validation and test rows.

    Where the task names no validation split, a random tenth of train by `seed` is held out. Rows
    stay in the order of their file. Limits take a random sample, of train and validation by `seed`.
    """
    _check_limits(train=train_limit, validation=validation_limit, test=test_limit)
    loaded = load(task, task.splits.train, data_dir)
    sources = {"train": loaded.source, "validation": loaded.source}
    if task.splits.validation is None:
        train, validation = _hold_out(task, loaded, seed)
    else:
        held = load(task, task.splits.validation, data_dir)
        train, validation, sources["validation"] = loaded.rows, held.rows, held.source
    test = load_test(task, data_dir, test_limit, load)
    sources["test"] = test.source
    train = _sample(train, train_limit, seed)
    return Splits(train, _sample(validation, validation_limit, seed), test.rows, sources)


def permutation(count: int, seed: int) -> np.ndarray:
    """A random order of `count` rows from a Philox stream keyed by the seed."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} must be in 0..2**64-1")
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def _hold_out(task: Task, loaded: Loaded, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = loaded.rows
    if len(rows) < 2:
        raise UserError(f"{loaded.source.location}: task '{task.name}' needs at least 2 train rows to divide, found 1")
    order = permutation(len(rows), seed)
    num_held = max(1, round(VALIDATION_SHARE * len(rows)))
    held, kept = np.sort(order[:num_held]), np.sort(order[num_held:])
    return [rows[index] for index in kept], [rows[index] for index in held]


def _sample(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in np.sort(permutation(len(rows), seed)[:limit])]


def _check_limits(**limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"{name} limit {limit} must be at least 1")


def _test_split(task: Task, data_dir: str | Path | None) -> str:
    """The first of the task's test splits that the folder has; elsewhere simply the first."""
    if task.generate is not None or data_dir is None:
        return task.splits.test[0]
    folder = row_files.task_folder(Path(data_dir), task.name)
    files = row_files.split_files(folder)
    for split in task.splits.test:
        if split in files:
            return split
    wanted = " or ".join(task.splits.test)
    raise UserError(f"{folder} has no test split ({wanted}); the splits there: {', '.join(files) or 'none'}")


_Numbered = list[tuple[int, dict[str, Any]]]


def _checked(task: Task, numbered: _Numbered, location: str) -> list[dict[str, Any]]:
    rows = []
    for number, row in numbered:
        try:
            if not task.usable(row):
                continue
            task.prompt(row)
            task.response(row)
        except UserError as error:
            raise UserError(f"{location} row {number}: {error}") from error
        rows.append(row)
    return rows


def _from_folder(task: Task, split: str, data_dir: Path) -> tuple[_Numbered, str, str, str]:
    path = row_files.split_file(row_files.task_folder(data_dir, task.name), split)
    return row_files.read_rows(path), "file", str(path), row_files.sha256(path)


def _from_hub(task: Task, split: str) -> tuple[_Numbered, str, str, str]:
    if task.hub_id is None:
        raise UserError(f"task '{task.name}' has no data set on the hub; give its rows with --data DIR")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"task '{task.name}' from the hub needs datasets; pip install 'peftdyno[hf]' or give --data DIR"
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # one line says it all where there is no network
    location = "/".join(part for part in (task.hub_id, task.subset, split) if part)
    try:
        table = datasets.load_dataset(task.hub_id, task.subset, split=split)
    except Exception as error:
        raise UserError(
            f"hub data set {location} cannot be loaded ({first_line(error)}); give its rows with --data DIR"
        ) from error
    rows = [dict(row) for row in table]
    return list(enumerate(rows, start=1)), "hub", location, _digest(rows)


def _generated(task: Task, split: str) -> tuple[_Numbered, str, str, str]:
    known = (task.splits.train, *task.splits.test)
    if split not in known:
        raise UserError(f"generated task '{task.name}' has no split '{split}'; it has: {', '.join(known)}")
    assert task.generate is not None
    rows = task.generate(split)
    return list(enumerate(rows, start=1)), "generator", f"generator:{task.name}/{split}", _digest(rows)


def _digest(rows: Iterable[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
