"""Answers that are numbers: a similarity, a final result, an equation."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

import numpy as np

from peftdyno.bench.metrics.answers import Pairs, share

TOLERANCE = 1e-6
MAX_EQUATION = 1000

_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_RESULT = re.compile(r"\s*[$€£]?\s*([+-]?)\s*[$€£]?\s*(\d[\d,]*(?:\.\d+)?|\.\d+)\s*%?[A-Za-z.\s]*")
_PLAIN_NUMBER = re.compile(r"^[+-]?(\d+(\.\d+)?|\.\d+)$")


def similarity(pairs: Pairs, rule: str) -> dict[str, float]:
    """Pearson's correlation of predicted and true scores.

    corrected: a prediction that is no plain number carries no information and takes the mean of the
    others (it adds nothing to the covariance, while its target still counts); without any spread the
    correlation is 0. published: it becomes -1, "nan" stays NaN, values pass through float32.
    """
    targets = np.array([float(target) for target in pairs.targets()])
    plain = [float(text) if _DECIMAL.fullmatch(text) else math.nan for text in pairs.predictions]
    guesses = np.array(plain)
    known = np.isfinite(guesses)
    figures = {"accuracy": share(guesses == targets), "invalid": share(~known)}
    if rule == "published":
        loose = np.array([_float_or(text, -1.0) for text in pairs.predictions])
        with np.errstate(over="ignore"):
            return {"pearson": pearson(loose.astype(np.float32), targets.astype(np.float32)), **figures}
    filled = np.where(known, guesses, guesses[known].mean() if known.any() else 0.0)
    value = pearson(filled, targets)
    return {"pearson": 0.0 if math.isnan(value) else value, **figures}


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two (N,) arrays; NaN where one is constant, not finite, or too short."""
    if len(first) < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return math.nan
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        return _finite_pearson(first, second)


def _finite_pearson(first: np.ndarray, second: np.ndarray) -> float:
    centred = [values.astype(np.float64) - values.mean(dtype=np.float64) for values in (first, second)]
    one, two = (_unit(values) for values in centred)
    return float(np.clip(np.dot(one, two), -1.0, 1.0))


def _unit(values: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = values / np.abs(values).max()
    unit: np.ndarray = scaled / np.linalg.norm(scaled)
    return unit


def final_number(pairs: Pairs, rule: str) -> dict[str, float]:
    """Share whose number after the last '####' equals the reference's.

    corrected: thousands separators, a currency sign, a per cent sign and words after the number do not
    matter. published: only commas and per cent signs are taken off before the text must be a number.
    """
    read = _published_result if rule == "published" else result
    guesses = [read(text) for text in pairs.predictions]
    targets = [read(text) for text in pairs.targets()]
    hits = [
        guess is not None and target is not None and abs(guess - target) < TOLERANCE
        for guess, target in zip(guesses, targets, strict=True)
    ]
    unread = [guess is None or target is None for guess, target in zip(guesses, targets, strict=True)]
    return {"final_number": share(hits), "accuracy": share(hits), "invalid": share(unread)}


def result(text: str) -> float | None:
    """The number on the line after the last '####'; None where there is none or more than one."""
    if "####" not in text:
        return None
    match = _RESULT.fullmatch(text.split("####")[-1].strip().split("\n")[0])
    return float(match[1] + match[2].replace(",", "")) if match else None


def _published_result(text: str) -> float | None:
    if "####" not in text:
        return None
    return _float_or(text.lower().split("####")[-1].strip().replace(",", "").replace("%", ""), None)


def equation(pairs: Pairs, rule: str) -> dict[str, float]:
    """Share of equations '( ... ) = n' that hold.

    corrected: and whose value is the reference's. published: any true equation counts.
    """
    guesses = [read_equation(text) for text in pairs.predictions]
    holds = [sides is not None and abs(sides[0] - sides[1]) < TOLERANCE for sides in guesses]
    targets = [read_equation(text) for text in pairs.targets()]
    matches = [
        hold and target is not None and guess is not None and abs(guess[0] - target[1]) < TOLERANCE
        for hold, guess, target in zip(holds, guesses, targets, strict=True)
    ]
    hits = holds if rule == "published" else matches
    return {"equation": share(hits), "accuracy": share(hits), "invalid": share([s is None for s in guesses])}


def read_equation(text: str) -> tuple[float, float] | None:
    """Values of both sides of '( arithmetic ) = number'; None for anything else."""
    if text.count("=") != 1 or len(text) > MAX_EQUATION:
        return None
    left, right = (side.strip() for side in text.split("="))
    if not _one_parenthesis(left) or not _PLAIN_NUMBER.match(right.replace(",", "")):
        return None
    try:
        return float(_value(ast.parse(left[1:-1].strip(), mode="eval").body)), float(right.replace(",", ""))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _one_parenthesis(text: str) -> bool:
    """Whether the parenthesis that opens the text closes at its very end."""
    if not text.startswith("("):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place == len(text) - 1
    return False


_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _value(node: ast.expr) -> float:
    """Value of a parsed arithmetic expression; no power, so that numbers stay as short as the text."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not arithmetic: {type(node).__name__}")


def _float_or(text: str, otherwise: float | None) -> float | None:
    try:
        return float(text)
    except ValueError:
        return otherwise
