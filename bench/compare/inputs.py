"""What the commands here read before they measure: a model that both sides can load, and rows of two tasks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from peftdyno.bench.compare.rows import TaskRows, task_rows
from peftdyno.bench.compare.sides import tell
from peftdyno.engine.errors import UserError
from peftdyno.engine.sources import resolve_model
from peftdyno.engine.tokenizer import Tokenizer

TRAIN_ROWS, TEST_ROWS = 512, 32


@dataclass(frozen=True)
class Inputs:
    """`model` is a folder of safetensors with its tokenizer."""

    model: str
    classification: TaskRows
    reasoning: TaskRows


def read_inputs(model: str, data: Path | None) -> Inputs:
    """Model and rows; UserError for a model without a folder or tokenizer, or for missing data."""
    files = resolve_model(model)
    if files.tokenizer_folder is None or files.weight_files[0].suffix != ".safetensors":
        raise UserError(f"--model {model}: transformers needs a folder of safetensors with a tokenizer.json")
    tokenizer = Tokenizer.load(files.tokenizer_folder)
    classification = task_rows("sst2", "gen-order", tokenizer, data, TRAIN_ROWS, TEST_ROWS)
    reasoning = task_rows("gsm8k", "gen-extract", tokenizer, data, TEST_ROWS, TEST_ROWS)
    for note in dict.fromkeys(filter(None, (classification.note, reasoning.note))):
        tell(note)
    return Inputs(str(files.weight_files[0].parent), classification, reasoning)


def positive(text: str) -> int:
    """A number from 1 on, as an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value
