"""A task: where a data set lives and how one of its rows becomes a prompt and an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peftdyno.engine.errors import UserError

Row = Mapping[str, Any]
RowText = Callable[[Row], str]

METRICS = (
    "f1",
    "macro_f1",
    "pearson",
    "answer_f1",
    "final_number",
    "equation",
    "codebleu",
    "exact_match",
)


def cell(row: Row, column: str) -> Any:
    """Value of a column; UserError that names the column and those that are there."""
    if column not in row:
        raise UserError(f"column '{column}' is missing; the row has: {', '.join(sorted(row)) or 'no columns'}")
    return row[column]


def text(row: Row, column: str) -> str:
    """Value of a column that must be text."""
    value = cell(row, column)
    if not isinstance(value, str):
        raise UserError(f"column '{column}' must be text, found {type(value).__name__} {str(value)[:40]}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"column '{column}' has half of a surrogate pair, which is no text")
    return value


def texts(row: Row, column: str, count: int) -> list[str]:
    """Value of a column that must be a list of `count` texts."""
    value = cell(row, column)
    if not isinstance(value, list) or len(value) != count or not all(isinstance(item, str) for item in value):
        raise UserError(f"column '{column}' must be a list of {count} texts, found {str(value)[:60]}")
    return value


def literal(column: str) -> RowText:
    """Row function that writes a column of any plain type as text."""

    def read(row: Row) -> str:
        value = cell(row, column)
        if not isinstance(value, str | int | float):
            raise UserError(f"column '{column}' must be text or a number, found {type(value).__name__}")
        return str(value)

    return read


def layout(template: str) -> RowText:
    """Row function that fills `{column}` places of a template with text columns."""

    def fill(row: Row) -> str:
        return template.format_map(_TextColumns(row))

    return fill


class _TextColumns(dict[str, str]):
    """Columns looked up on demand, so that a missing one is named."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row

    def __missing__(self, column: str) -> str:
        return text(self.row, column)


def class_index(row: Row, column: str, first: int, count: int) -> int:
    """Class number in [0, count) of an integer column, or of digits as text, counted from `first`."""
    value = cell(row, column)
    digits = isinstance(value, str) and value.strip().lstrip("-").isdecimal()
    if isinstance(value, bool) or not (isinstance(value, int) or digits):
        raise UserError(f"column '{column}' must be a class number, found {str(value)[:40]!r}")
    if not first <= int(value) < first + count:
        raise UserError(f"column '{column}': label {value} is out of range {first}..{first + count - 1}")
    return int(value) - first


@dataclass(frozen=True, kw_only=True)
class SplitNames:
    """Split names at the source.

    `validation` is None where the protocol takes it out of `train` at random. `test` lists the
    splits that may serve as test data, best first; which one did is part of the run's record.
    """

    train: str = "train"
    validation: str | None = None
    test: tuple[str, ...] = ("validation",)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set of the bench.

    `inputs` are one or two columns, or row functions. `target` is a column or a row function: with
    `labels` and `first_label` the column holds a class number counted from `first_label`; with
    `first_label` None it holds the label word itself; without labels it holds the answer.
    `answers` gives all accepted answers where there may be several. `keep` drops rows the task
    cannot use; how many were dropped is recorded. `rendered` names the input columns and then the answer
    column of a copy of the data set that carries ready text; rows that have them all are read from them.
    """

    name: str
    category: str
    metric: str
    instruction: str
    inputs: tuple[str | RowText, ...]
    target: str | RowText = "label"
    labels: tuple[str, ...] | None = None
    first_label: int | None = 0
    hub_id: str | None = None
    subset: str | None = None
    splits: SplitNames = field(default_factory=SplitNames)
    max_new_tokens: int = 16
    answers_of: Callable[[Row], tuple[str, ...]] | None = None
    keep: Callable[[Row], bool] | None = None
    generate: Callable[[str], list[dict[str, Any]]] | None = None
    test_instruction: str | None = None
    rendered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the declaration once."""
        assert self.metric in METRICS, (self.name, self.metric)
        assert len(self.inputs) in (1, 2), (self.name, self.inputs)
        if self.metric in ("f1", "macro_f1"):
            assert self.labels is not None, self.name
        if self.metric == "f1":
            assert len(self.labels or ()) == 2, (self.name, self.labels)
        if self.labels is not None:
            assert len({label.lower() for label in self.labels}) == len(self.labels), self.labels

    def prompt(self, row: Row, role: str = "train") -> str:
        """Instruction and inputs, a newline between each two; role "test" may word it differently."""
        wording = self.instruction
        if role == "test" and self.test_instruction is not None:
            wording = self.test_instruction
        return "\n".join(part for part in (wording, *self._inputs(row)) if part)

    def response(self, row: Row) -> str:
        """The text to learn: a label word, or the first accepted answer."""
        answer = self._answer(row)
        if not answer.strip():
            raise UserError(f"column '{self._target_name(row)}': the answer is empty")
        if self.labels is not None and answer.lower() not in {label.lower() for label in self.labels}:
            raise UserError(
                f"column '{self._target_name(row)}': {answer[:40]!r} is no label ({', '.join(self.labels)})"
            )
        return answer

    def answers(self, row: Row) -> tuple[str, ...]:
        """All accepted answers, at least one."""
        if self.answers_of is None or (self.is_rendered(row) and "answers" not in row):
            return (self.response(row),)
        return self.answers_of(row)

    def usable(self, row: Row) -> bool:
        """Whether the row has what the task learns from; rows without it are counted, not used."""
        if self.keep is None:
            return True
        return bool(self._answer(row).strip()) if self.is_rendered(row) else self.keep(row)

    def declaration(self) -> dict[str, Any]:
        """The task as plain values for a record; row functions by name."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: _plain(value) for name, value in values.items()}

    def is_rendered(self, row: Row) -> bool:
        """Whether the row carries ready text in the columns `rendered`."""
        return bool(self.rendered) and all(column in row for column in self.rendered)

    def _inputs(self, row: Row) -> list[str]:
        if self.is_rendered(row):
            return [text(row, column) for column in self.rendered[:-1]]
        return [part(row) if callable(part) else text(row, part) for part in self.inputs]

    def _answer(self, row: Row) -> str:
        if self.is_rendered(row):
            return text(row, self.rendered[-1])
        if callable(self.target):
            return self.target(row)
        if self.labels is None or self.first_label is None:
            return text(row, self.target)
        return self.labels[class_index(row, self.target, self.first_label, len(self.labels))]

    def _target_name(self, row: Row) -> str:
        if self.is_rendered(row):
            return self.rendered[-1]
        return self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "answer")


def _plain(value: Any) -> Any:
    if isinstance(value, SplitNames):
        return {"train": value.train, "validation": value.validation, "test": list(value.test)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return getattr(value, "__qualname__", "function") if callable(value) else value
