"""Predictions side by side with what would have been right, and exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftdyno.bench.task import Row, Task
from peftdyno.engine.errors import UserError

THINK_END = "</think>\n\n"


@dataclass(frozen=True)
class Pairs:
    """What a scorer sees: one prediction, its accepted answers and its row, each N long; labels if any."""

    predictions: list[str]
    answers: list[tuple[str, ...]]
    rows: list[Row]
    labels: tuple[str, ...]

    def targets(self) -> list[str]:
        """The first accepted answer of each row."""
        return [accepted[0] for accepted in self.answers]


def paired(task: Task, predictions: Sequence[str], rows: Sequence[Row]) -> Pairs:
    """Line predictions up with the answers of their rows; UserError for unequal or no rows."""
    if len(predictions) != len(rows):
        raise UserError(f"task '{task.name}': {len(predictions)} predictions for {len(rows)} rows; they must pair up")
    if not rows:
        raise UserError(f"task '{task.name}': there are no predictions to score")
    answers = [tuple(final(answer) for answer in task.answers(row)) for row in rows]
    return Pairs([final(text) for text in predictions], answers, list(rows), task.labels or ())


def final(text: str) -> str:
    """The answer after any thinking, without surrounding white space."""
    return text.split(THINK_END)[-1].strip()


def share(hits: Sequence[bool]) -> float:
    """Fraction of true values."""
    return float(sum(hits) / len(hits))


def exact_match(pairs: Pairs, rule: str) -> dict[str, float]:
    """Equality with an accepted answer up to case; published: with the first, on 16 characters."""
    if rule == "published":
        hits = [cut(guess) == cut(target) for guess, target in zip(pairs.predictions, pairs.targets(), strict=True)]
    else:
        hits = [
            guess.lower() in {answer.lower() for answer in accepted}
            for guess, accepted in zip(pairs.predictions, pairs.answers, strict=True)
        ]
    invalid = share([not guess for guess in pairs.predictions])
    return {"exact_match": share(hits), "accuracy": share(hits), "invalid": invalid}


def cut(text: str) -> str:
    """Lower-cased text as a fixed-width array of 16 characters holds it: cut, without NULs at the end."""
    return text.lower()[:16].rstrip("\0")
