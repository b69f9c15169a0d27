"""Scoring: test rows stream through the model in batches, several adapters at once, and each finished prediction is
on disk before the next batch, so that a killed evaluation continues where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftdyno.bench.metrics import score_both
from peftdyno.bench.rendering import test_prompt
from peftdyno.bench.store import Scores
from peftdyno.bench.task import Row, Task
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.panels import PackWeights, packed_weights
from peftdyno.engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called after a batch with (rows done, rows in all)."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one adapter, the number of test prompts that were cut, and the predicted texts."""

    scores: Scores
    num_cut: int
    predictions: list[str]


def evaluate(
    decoder: Decoder,
    bank: AdapterBank,
    tokenizer: Tokenizer,
    task: Task,
    rows: Sequence[Row],
    files: Sequence[Path],
    *,
    batch: int,
    max_length: int,
    pack_weights: PackWeights = "off",
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Score each run of the bank on the rows by greedy generation; `files` are the runs' predictions.jsonl.

    `batch` rows of each run are computed at a time. What the files hold already is kept; a line that was cut short is
    written again. `pack_weights` says whether decoding keeps the weights a second time (engine/panels.py). UserError
    where a file holds other rows' predictions.
    """
    assert len(files) == bank.num_runs, (files, bank.num_runs)
    found = [_finished_lines(path, task, rows) for path in files]
    done = min(len(lines) for lines in found)
    for path, lines in zip(files, found, strict=True):
        _cut_back(path, lines[:done])
    predictions = [[line["prediction"] for line in lines[:done]] for lines in found]
    num_cut = sum(test_prompt(task, row, tokenizer, max_length).cut > 0 for row in rows[:done])
    with packed_weights(decoder, pack_weights):
        for start in range(done, len(rows), batch):
            some = rows[start : start + batch]
            prompts = [test_prompt(task, row, tokenizer, max_length) for row in some]
            num_cut += sum(prompt.cut > 0 for prompt in prompts)
            answers = _answer(decoder, bank, tokenizer, task, [prompt.tokens for prompt in prompts])
            for path, texts, kept in zip(files, answers, predictions, strict=True):
                _append(path, start, texts, [task.answers(row) for row in some])
                kept += texts
            if progress is not None:
                progress(start + len(some), len(rows))
    return [Evaluation(plain_scores(score_both(task, texts, rows)), num_cut, texts) for texts in predictions]


def _answer(
    decoder: Decoder, bank: AdapterBank, tokenizer: Tokenizer, task: Task, prompts: Sequence[tuple[int, ...]]
) -> list[list[str]]:
    """Each run's answers to the prompts."""
    sequences = [
        PackSequence(tokens=prompt, num_prompt=len(prompt), run=run)
        for run in range(bank.num_runs)
        for prompt in prompts
    ]
    generated = generate(decoder, bank, sequences, max_new_tokens=task.max_new_tokens, eos_ids=tokenizer.eos_ids)
    texts = [tokenizer.decode(tokens) for tokens in generated]
    return [texts[run * len(prompts) : (run + 1) * len(prompts)] for run in range(bank.num_runs)]


def plain_scores(scores: dict[str, dict[str, float]]) -> Scores:
    """Scores as JSON takes them: what is not a number becomes null."""
    return {
        rule: {name: value if math.isfinite(value) else None for name, value in figures.items()}
        for rule, figures in scores.items()
    }


def _finished_lines(path: Path, task: Task, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The whole lines at the beginning of a predictions file, each checked to be of its row."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
            number, answers = line["row"], tuple(line["answers"])
        except (ValueError, KeyError, TypeError):
            break
        if number != len(lines) or number >= len(rows) or answers != task.answers(rows[number]):
            raise UserError(f"{path} holds predictions of other rows; remove it")
        lines.append(line)
    return lines


def _cut_back(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Leave only these lines in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(sum(len(_line(line)) for line in lines))


def _append(path: Path, start: int, texts: Sequence[str], answers: Sequence[tuple[str, ...]]) -> None:
    pairs = enumerate(zip(texts, answers, strict=True), start=start)
    with path.open("ab") as file:
        for row, (text, accepted) in pairs:
            file.write(_line({"row": row, "prediction": text, "answers": list(accepted)}))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
