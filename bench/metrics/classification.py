"""F1 of answers that should be one of a few labels."""

from __future__ import annotations

import numpy as np

from peftdyno.bench.metrics.answers import Pairs, cut, share
from peftdyno.engine.errors import UserError

INVALID = -1


def binary_f1(pairs: Pairs, rule: str) -> dict[str, float]:
    """F1 of the second label.

    corrected: an answer outside the labels predicts neither class. published: it counts as the wrong label.
    """
    targets, guesses = _classes(pairs, rule)
    counted = _swap_invalid(targets, guesses) if rule == "published" else guesses
    return {"f1": float(class_f1(targets, counted, 1)), **_shares(targets, guesses)}


def macro_f1(pairs: Pairs, rule: str) -> dict[str, float]:
    """Mean F1 over the classes.

    corrected: over all declared labels (0 for one that neither occurs nor is predicted), and an answer
    outside them predicts no class. published: over classes that occur, and such an answer becomes the
    first label if the target is the second, else the second.
    """
    targets, guesses = _classes(pairs, rule)
    counted, classes = guesses, np.arange(len(pairs.labels))
    if rule == "published":
        counted = _swap_invalid(targets, guesses)
        classes = np.union1d(targets, counted)
    mean = np.mean([class_f1(targets, counted, int(index)) for index in classes])
    return {"macro_f1": float(mean), **_shares(targets, guesses)}


def class_f1(targets: np.ndarray, guesses: np.ndarray, index: int) -> float:
    """2 TP / (targets + guesses) of one class; 0 where it has neither."""
    right = np.sum((targets == index) & (guesses == index))
    total = np.sum(targets == index) + np.sum(guesses == index)
    return 2 * right / total if total else 0.0


def _classes(pairs: Pairs, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers of targets and predictions, each (N,); INVALID for an answer outside the labels."""
    read = cut if rule == "published" else str.lower
    if rule == "published" and (long := next((label for label in pairs.labels if len(label) > 16), None)):
        raise UserError(f"published scoring compares 16 characters; label '{long}' is longer: use corrected scoring")
    number = {label.lower(): index for index, label in enumerate(pairs.labels)}
    targets = [number[read(target)] for target in pairs.targets()]
    guesses = [number.get(read(guess), INVALID) for guess in pairs.predictions]
    return np.array(targets), np.array(guesses)


def _swap_invalid(targets: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    return np.where(guesses == INVALID, np.where(targets == 1, 0, 1), guesses)


def _shares(targets: np.ndarray, guesses: np.ndarray) -> dict[str, float]:
    return {"accuracy": share(targets == guesses), "invalid": share(guesses == INVALID)}
