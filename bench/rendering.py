"""Rows to tokens: the one way in which training, evaluation and `inspect` put a task before a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from peftdyno.bench.task import Row, Task
from peftdyno.engine.batching import Example, batch_indices, fit, steps_per_epoch
from peftdyno.engine.errors import UserError
from peftdyno.engine.tokenizer import Tokenizer


def prompt_text(task: Task, row: Row, tokenizer: Tokenizer, role: str = "train") -> str:
    """The prompt of a row in the model's chat template, up to where the answer begins."""
    return tokenizer.chat(task.prompt(row, role))


def training_example(task: Task, row: Row, tokenizer: Tokenizer, max_length: int) -> Example:
    """Prompt and answer; the answer's tokens and the end of the turn are the labels."""
    prompt, response = tokenizer.render(prompt_text(task, row, tokenizer), task.response(row))
    try:
        return fit(prompt, response, max_length)
    except ValueError as error:
        raise UserError(f"task '{task.name}': {error} tokens; raise --max-length") from error


def test_prompt(task: Task, row: Row, tokenizer: Tokenizer, max_length: int) -> Example:
    """The prompt alone, cut so that the longest answer still fits."""
    room = max_length - task.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-length {max_length} leaves no room for {task.max_new_tokens} new tokens of '{task.name}'"
        )
    return fit(tokenizer.prompt_ids(prompt_text(task, row, tokenizer, "test")), (), room)


@dataclass
class Examples(Sequence[Example]):
    """Training examples of rows, tokenised when they are asked for, so that a large data set costs no memory."""

    task: Task
    rows: Sequence[dict[str, Any]]
    tokenizer: Tokenizer
    max_length: int
    cuts: dict[int, int] = field(default_factory=dict)
    """Row -> tokens cut from its prompt, of the rows seen so far."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = training_example(self.task, self.rows[index], self.tokenizer, self.max_length)
        self.cuts[index] = example.cut
        return example

    def used(self, batch: int, seed: int, steps: int) -> set[int]:
        """The rows that training for some steps goes through."""
        if steps >= steps_per_epoch(len(self), batch):
            return set(range(len(self)))
        return {i for step in range(steps) for i in batch_indices(len(self), batch, seed, step)}

    def num_cut(self, indices: set[int]) -> int:
        """How many of these rows' prompts were cut, whether or not they were tokenised before."""
        for index in indices - self.cuts.keys():
            self[index]
        return sum(self.cuts[index] > 0 for index in indices)
