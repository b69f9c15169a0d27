"""Scores of predictions: pure functions of texts and rows, by the corrected or the published rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftdyno.bench.metrics.answers import Pairs, exact_match, paired
from peftdyno.bench.metrics.classification import binary_f1, macro_f1
from peftdyno.bench.metrics.code import code_score
from peftdyno.bench.metrics.numbers import equation, final_number, similarity
from peftdyno.bench.metrics.record import answer_f1
from peftdyno.bench.task import METRICS, Row, Task
from peftdyno.engine.errors import unknown

RULES = ("corrected", "published")

_SCORERS: dict[str, Callable[[Pairs, str], dict[str, float]]] = {
    "f1": binary_f1,
    "macro_f1": macro_f1,
    "pearson": similarity,
    "answer_f1": answer_f1,
    "final_number": final_number,
    "equation": equation,
    "codebleu": code_score,
    "exact_match": exact_match,
}
assert tuple(_SCORERS) == METRICS


def score(task: Task, predictions: Sequence[str], rows: Sequence[Row], rule: str = "corrected") -> dict[str, float]:
    """Figures of a task's predictions, all fractions of 1; the first, under `task.metric`, is the main one.

    `accuracy` and `invalid` (share of answers that are not of the asked form) come with every task.
    `published` follows PEFT-Bench's scoring (arXiv:2511.21285) with its defects, which may give NaN.
    """
    if rule not in RULES:
        raise unknown("scoring rule", rule, RULES)
    figures = _SCORERS[task.metric](paired(task, predictions, rows), rule)
    assert next(iter(figures)) == task.metric, (task.metric, figures)
    return figures


def score_both(task: Task, predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Figures by each rule: {"corrected": ..., "published": ...}."""
    return {rule: score(task, predictions, rows, rule) for rule in RULES}
