"""The four parts of CodeBLEU for Python (Ren et al., arXiv:2009.10297); code is parsed, never run."""

from __future__ import annotations

import ast
import keyword
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from peftdyno.bench.metrics.dataflow import Flow, flows

KEYWORDS = frozenset(keyword.kwlist) | {"match", "case", "type"}
PLAIN_WEIGHT = 0.2
ORDERS = (1, 2, 3, 4)
SMOOTHING = 0.1

Pair = tuple[list[str], list[str]]
Counts = tuple[float, float]


def parts(references: Sequence[str], candidates: Sequence[str], published: bool = False) -> dict[str, float | None]:
    """Corpus scores `ngram`, `weighted_ngram`, `syntax`, `dataflow` in [0, 1], a reference a candidate.

    None where the references have nothing to compare. `published` follows the usual implementation
    where it leaves the paper: a candidate's subtree serves any number of matches instead of one, the
    brevity penalty of the weighted part takes every reference for two tokens long, and rows too short
    for an n-gram count as a miss.
    """
    tokens = [(wanted.split(), found.split()) for wanted, found in zip(references, candidates, strict=True)]
    length = sum(len(wanted) for wanted, _ in tokens)
    trees = [(parse(wanted), parse(found)) for wanted, found in zip(references, candidates, strict=True)]
    parsed = [(wanted, found) for wanted, found in trees if wanted is not None]
    return {
        "ngram": bleu(tokens, precision_counts, length, published),
        "weighted_ngram": bleu(tokens, weighted_recall_counts, 2 * len(tokens) if published else length, published),
        "syntax": _ratio([syntax_counts(wanted, found, clip=not published) for wanted, found in parsed]),
        "dataflow": _ratio([dataflow_counts(wanted, found) for wanted, found in parsed]),
    }


def parse(code: str) -> ast.Module | None:
    """Syntax tree of Python code; None where it does not parse or is nested too deep to walk."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
            flows(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree


def bleu(
    pairs: Sequence[Pair],
    counts: Callable[[list[str], list[str], int], Counts],
    wanted: int,
    published: bool = False,
) -> float:
    """Geometric mean over n = 1..4 of corpus counts, times the brevity penalty.

    `pairs` are (reference, candidate) tokens, `wanted` the length to reach. An n of which the references
    have nothing is left out; no match at some n counts as a tenth of one (smoothing 1 of Chen and Cherry,
    2014). `published`: no n is left out, and a row too short for n has one unmatched n-gram.
    """
    orders = [n for n in ORDERS if published or any(len(reference) >= n for reference, _ in pairs)]
    matched, total = dict.fromkeys(ORDERS, 0.0), dict.fromkeys(ORDERS, 0.0)
    for reference, candidate in pairs:
        for n in orders:
            right, of = counts(reference, candidate, n)
            matched[n] += right
            total[n] += max(1, of) if published else of
    if not matched[1]:
        return 0.0
    length = sum(len(candidate) for _, candidate in pairs)
    brevity = 1.0 if length > wanted else math.exp(1 - wanted / length)
    logs = [math.log((matched[n] or SMOOTHING) / (total[n] or 1.0)) for n in orders]
    return brevity * math.exp(sum(logs) / len(logs))


def precision_counts(reference: list[str], candidate: list[str], n: int) -> Counts:
    """n-grams of the candidate that the reference has as often, and all of them."""
    found = ngrams(candidate, n)
    return (found & ngrams(reference, n)).total(), found.total()


def weighted_recall_counts(reference: list[str], candidate: list[str], n: int) -> Counts:
    """n-grams of the reference that the candidate has, and all; lone keywords weigh 1, other tokens 0.2."""
    wanted = ngrams(reference, n)
    shared = wanted & ngrams(candidate, n)
    if n > 1:
        return shared.total(), wanted.total()
    right, of = (sum(count * _weight(gram[0]) for gram, count in grams.items()) for grams in (shared, wanted))
    return right, of


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n tokens occurs."""
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def syntax_counts(reference: ast.Module, candidate: ast.Module | None, clip: bool) -> Counts:
    """Subtrees of the reference that the candidate has, and all of them."""
    shapes: dict[tuple[object, ...], int] = {}
    wanted = Counter(subtrees(reference, shapes))
    found = Counter(subtrees(candidate, shapes) if candidate is not None else [])
    if clip:
        return (wanted & found).total(), wanted.total()
    return sum(count for shape, count in wanted.items() if shape in found), wanted.total()


def subtrees(tree: ast.Module, shapes: dict[tuple[object, ...], int]) -> list[int]:
    """Numbers of the shapes of all inner nodes; names, values and load/store marks do not count.

    `shapes` maps (node type, shapes of children) to its number and grows; equal subtrees share one.
    """
    number: dict[ast.AST, int] = {}
    inner = []
    for node in reversed(list(ast.walk(tree))):
        children = [number[child] for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
        shape = (type(node), *children)
        number[node] = shapes.setdefault(shape, len(shapes))
        if children:
            inner.append(number[node])
    return inner


def dataflow_counts(reference: ast.Module, candidate: ast.Module | None) -> Counts:
    """Data flows of the reference that the candidate has, each once, and all of them."""
    wanted: Counter[Flow] = Counter(flows(reference))
    found: Counter[Flow] = Counter(flows(candidate) if candidate is not None else [])
    return (wanted & found).total(), wanted.total()


def _ratio(counts: list[Counts]) -> float | None:
    total = sum(of for _, of in counts)
    return sum(right for right, _ in counts) / total if total else None


def _weight(token: str) -> float:
    return 1.0 if token in KEYWORDS else PLAIN_WEIGHT
