"""LLaMA-Factory's dataset_info format: a file that words, divides or adds tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftdyno.bench.task import SplitNames, Task, literal
from peftdyno.engine.errors import UserError

SUFFIXES = ("_eval", "_test")


class Columns(BaseModel):
    """Which columns hold the two inputs and the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    query: str | None = None
    response: str


class Entry(BaseModel):
    """One split of a data set with its instruction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    hf_hub_url: str
    subset: str | None = None
    split: str = "train"
    instruction: str = ""
    columns: Columns = Field(default_factory=lambda: Columns(prompt="prompt", response="response"))


class TasksFile(NamedTuple):
    """Tasks with a file laid over them, and what in the file a user should know of."""

    tasks: dict[str, Task]
    warnings: list[str]


def apply_tasks_file(tasks: dict[str, Task], path: str | Path) -> TasksFile:
    """Lay a dataset_info file over tasks.

    NAME trains, NAME_eval tests; the split of NAME_test serves where that of NAME_eval is absent. A
    known task takes instructions and splits from the file and keeps its labels and metric. Where the
    file names another copy of the data set, rows that have the file's columns are read from them as
    ready text. An unknown NAME becomes a task of its own, scored by exact match. UserError names entry
    and field.
    """
    entries = read_entries(Path(path))
    laid, warnings = dict(tasks), []
    for name in (name for name in entries if _base(name, entries) == name):
        train, test = entries[name], entries.get(f"{name}_eval")
        known = tasks.get(name)
        spare = entries.get(f"{name}_test")
        laid[name] = _overlay(known, train, test, spare) if known else _own(name, train, test)
        warnings += _wording_warnings(name, train, test)
        warnings += _source_warnings(name, known, entries)
    return TasksFile(laid, warnings)


def read_entries(path: Path) -> dict[str, Entry]:
    """Checked entries of a file by name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"tasks file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"tasks file {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"tasks file {path} must be an object of entries by name, found a {type(content).__name__}")
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    for name in entries:
        if _base(name, entries) is None:
            raise UserError(f"tasks file {path}: entry '{name}' needs an entry '{name[:-5]}' to train")
    return entries


def _entry(path: Path, name: str, value: object) -> Entry:
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            allowed = Columns.model_fields if place.startswith("columns.") else Entry.model_fields
            problem = f"unknown field '{place}'; known: {', '.join(allowed)}"
        else:
            problem = f"field '{place}': {first['msg']}" if place else first["msg"]
        raise UserError(f"tasks file {path}: entry '{name}': {problem}") from error


def _base(name: str, entries: dict[str, Entry]) -> str | None:
    """The entry a name belongs to; None for a _eval or _test without one to train on."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            base = name.removesuffix(suffix)
            return base if base in entries else None
    return name


def _overlay(task: Task, train: Entry, test: Entry | None, spare: Entry | None) -> Task:
    tests = tuple(entry.split for entry in (test, spare) if entry is not None)
    names = replace(task.splits, train=train.split, test=tests or task.splits.test)
    changed = replace(
        task,
        instruction=train.instruction,
        test_instruction=None if test is None else test.instruction,
        splits=names if task.generate is None else task.splits,
    )
    if not _is_ready_text(task, train):
        return changed
    columns = (train.columns.prompt, train.columns.query, train.columns.response)
    rendered = tuple(column for column in columns if column is not None)
    return replace(changed, hub_id=train.hf_hub_url, subset=train.subset, rendered=rendered)


def _own(name: str, train: Entry, test: Entry | None) -> Task:
    columns = train.columns
    inputs = (columns.prompt,) if columns.query is None else (columns.prompt, columns.query)
    return Task(
        name=name,
        category="own",
        metric="exact_match",
        instruction=train.instruction,
        test_instruction=None if test is None else test.instruction,
        inputs=tuple(literal(column) for column in inputs),
        target=literal(columns.response),
        hub_id=train.hf_hub_url,
        subset=train.subset,
        splits=SplitNames(train=train.split, test=("test" if test is None else test.split,)),
        max_new_tokens=64,
    )


def _is_ready_text(task: Task, entry: Entry) -> bool:
    """Whether the entry names a copy of the data set whose answers stand in a column of their own."""
    return (task.hub_id, task.subset) != (
        entry.hf_hub_url,
        entry.subset,
    ) and task.target != entry.columns.response


def _wording_warnings(name: str, train: Entry, test: Entry | None) -> list[str]:
    found = [
        f"{label}: the instruction is empty"
        for label, entry in ((name, train), (f"{name}_eval", test))
        if entry is not None and not entry.instruction
    ]
    if test is not None and test.instruction != train.instruction:
        found.append(f"{name}: training and evaluation are worded differently")
    return found


def _source_warnings(name: str, known: Task | None, entries: dict[str, Entry]) -> list[str]:
    train, test = entries[name], entries.get(f"{name}_eval")
    found = []
    if test is None:
        found.append(f"{name}: no entry '{name}_eval'; the test split is the task's own")
    elif (test.hf_hub_url, test.subset) != (train.hf_hub_url, train.subset):
        found.append(f"{name}_eval: data set {test.hf_hub_url} is not the one trained on, {train.hf_hub_url}")
    if f"{name}_test" in entries:
        found.append(f"{name}_test: split {entries[f'{name}_test'].split} serves only where {name}_eval's is absent")
    if known is not None and _is_ready_text(known, train):
        columns = f"{train.columns.prompt} and {train.columns.response}"
        found.append(f"{name}: rows without the columns {columns} are worded by the built-in task")
    return found
