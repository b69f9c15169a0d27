"""Token rows, as both sides get them: JSON with the tokens and how many of them are prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftdyno.bench.data import load_rows, load_test
from peftdyno.bench.rendering import test_prompt, training_example
from peftdyno.bench.tasks import get_task
from peftdyno.engine.batching import batch_indices
from peftdyno.engine.tokenizer import Tokenizer

MAX_LENGTH = 2048
"""Tokens of a sequence, as PEFT-Bench cuts them."""


@dataclass(frozen=True)
class TokenRow:
    """One example: `tokens`, of which those from `num_prompt` on are labels."""

    tokens: tuple[int, ...]
    num_prompt: int

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> TokenRow:
        """A row out of JSON."""
        return cls(tuple(row["tokens"]), row["num_prompt"])

    @property
    def num_labels(self) -> int:
        """Tokens with a loss; the first token of a sequence has no predecessor."""
        return len(self.tokens) - max(self.num_prompt, 1)

    def plain(self) -> dict[str, Any]:
        """The row for JSON."""
        return {"tokens": list(self.tokens), "num_prompt": self.num_prompt}


def text_batches(count: int, rows: int, length: int, texts: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Batches of different text, as `text_batch` makes one."""
    flat = text_batch(count * rows, length, texts)
    return [flat[i * rows : (i + 1) * rows] for i in range(count)]


def text_batch(rows: int, length: int, texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of real tokens cut out of a text that the examples make when joined, labelled from the second token on:
    the first has no predecessor, except behind learned positions, which PEFT would count."""
    stream = [token for text in texts for token in text["tokens"]]
    while len(stream) < rows * length:
        stream += stream
    return [TokenRow(tuple(stream[i * length : (i + 1) * length]), 1).plain() for i in range(rows)]


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """A task's rows as tokens, with what they are."""

    name: str
    train: list[dict[str, Any]]
    prompts: list[list[int]]
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    note: str


def task_rows(name: str, stand_in: str, tokenizer: Tokenizer, data: Path | None, train: int, test: int) -> TaskRows:
    """Rows of a task out of the folder `data`, or of the generated task `stand_in` where there is no folder."""
    task = get_task(name if data is not None else stand_in)
    note = "" if data is not None else f"no --data: rows of the generated task {stand_in} stand in for {name}"
    train_rows = load_rows(task, task.splits.train, data).rows[:train]
    test_rows = load_test(task, data, test).rows
    examples = [training_example(task, row, tokenizer, MAX_LENGTH) for row in train_rows]
    return TaskRows(
        name=task.name,
        train=[TokenRow(example.tokens, example.num_prompt).plain() for example in examples],
        prompts=[list(test_prompt(task, row, tokenizer, MAX_LENGTH).tokens) for row in test_rows],
        max_new_tokens=task.max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        note=note,
    )


def in_order(rows: Sequence[Any], batch: int, seed: int, steps: int) -> list[list[Any]]:
    """The batches of the first steps, in the order in which our loop draws them for a seed."""
    return [[rows[i] for i in batch_indices(len(rows), batch, seed, step)] for step in range(steps)]
