"""ReCoRD: F1 over words, the best over the accepted answers (SuperGLUE, arXiv:1905.00537)."""

from __future__ import annotations

import re
import string
from collections import Counter

from peftdyno.bench.metrics.answers import Pairs, share

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_f1(pairs: Pairs, rule: str) -> dict[str, float]:
    """Mean over queries of the best word F1.

    corrected: each query counts once, each with its own prediction. published: a query counts once for
    every accepted answer, and of several predictions for one query the last stands for all.
    """
    numbers = range(len(pairs.rows))
    if rule == "published":
        numbers = _published_numbers(pairs)
    scored = [(pairs.predictions[guess], pairs.answers[row]) for row, guess in _by_query(pairs, numbers, rule)]
    best = [max(word_f1(guess, answer) for answer in accepted) for guess, accepted in scored]
    equal = [words(guess) in [words(answer) for answer in accepted] for guess, accepted in scored]
    invalid = [not words(guess) for guess, _ in scored]
    return {"answer_f1": sum(best) / len(best), "accuracy": share(equal), "invalid": share(invalid)}


def word_f1(guess: str, answer: str) -> float:
    """F1 of two bags of words; 0 without a word in common."""
    guessed, wanted = words(guess), words(answer)
    shared = (Counter(guessed) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(guessed), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _published_numbers(pairs: Pairs) -> list[int]:
    """Row numbers as the published file has them: a row for each accepted answer."""
    return [
        number
        for number, row in enumerate(pairs.rows)
        for _ in range(1 if "targets" in row else len(pairs.answers[number]))
    ]


def _by_query(pairs: Pairs, numbers: range | list[int], rule: str) -> list[tuple[int, int]]:
    """(row, row whose prediction stands for it)."""
    if rule == "corrected":
        return [(number, number) for number in numbers]
    last = {_query(pairs, number): number for number in numbers}
    return [(number, last[_query(pairs, number)]) for number in numbers]


def _query(pairs: Pairs, number: int) -> object:
    """The query's own number where the row has one, else the row's."""
    index = pairs.rows[number].get("idx")
    return ("query", index["query"]) if isinstance(index, dict) and "query" in index else number
