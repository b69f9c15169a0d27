"""The GLUE data sets (arXiv:1804.07461), in the order of the benchmark's tables."""

from __future__ import annotations

import math

from peftdyno.bench.task import Row, SplitNames, Task, cell
from peftdyno.engine.errors import UserError

_HUB = "nyu-mll/glue"


def similarity(row: Row) -> str:
    """STS-B score from 0 to 5 without float32's tail: 3.799999952 reads 3.8, and 5 reads 5.0."""
    value = cell(row, "label")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"column 'label' must be a number, found {value!r}")
    if not 0 <= value <= 5:
        raise UserError(f"column 'label': score {value} is out of range 0..5")
    digits = f"{value:.3f}".rstrip("0")
    return digits + "0" if digits.endswith(".") else digits


TASKS = (
    Task(
        name="mnli",
        category="glue",
        metric="macro_f1",
        hub_id=_HUB,
        subset="mnli",
        splits=SplitNames(test=("validation_mismatched", "validation_matched")),
        instruction=(
            "Does the second text follow from the first, contradict it, or neither? "
            "Reply with one word: entailment, neutral or contradiction."
        ),
        inputs=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
    ),
    Task(
        name="qqp",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="qqp",
        instruction="Do these two questions ask the same thing? Reply with duplicate or not_duplicate.",
        inputs=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
    ),
    Task(
        name="qnli",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="qnli",
        instruction=(
            "Does the sentence below contain the answer to the question? "
            "Reply with entailment if it does and not_entailment if it does not."
        ),
        inputs=("question", "sentence"),
        labels=("entailment", "not_entailment"),
    ),
    Task(
        name="sst2",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="sst2",
        instruction="Is the feeling of this movie review negative or positive? Reply with that one word.",
        inputs=("sentence",),
        labels=("negative", "positive"),
    ),
    Task(
        name="stsb",
        category="glue",
        metric="pearson",
        hub_id=_HUB,
        subset="stsb",
        instruction=(
            "How close are these two sentences in meaning? "
            "Reply with a number between 0 (unrelated) and 5 (the same meaning)."
        ),
        inputs=("sentence1", "sentence2"),
        target=similarity,
        max_new_tokens=8,
    ),
    Task(
        name="mrpc",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="mrpc",
        instruction="Do these two sentences say the same? Reply with equivalent or not_equivalent.",
        inputs=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
    ),
    Task(
        name="rte",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="rte",
        instruction=(
            "Is the second sentence true whenever the first one is? "
            "Reply with entailment if it is and not_entailment if it is not."
        ),
        inputs=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
    ),
    Task(
        name="cola",
        category="glue",
        metric="f1",
        hub_id=_HUB,
        subset="cola",
        instruction="Is this a grammatical English sentence? Reply with acceptable or unacceptable.",
        inputs=("sentence",),
        labels=("unacceptable", "acceptable"),
    ),
)
