"""CodeBLEU over a set of programs, by either rule."""

from __future__ import annotations

from collections import Counter

from peftdyno.bench.metrics import codebleu
from peftdyno.bench.metrics.answers import Pairs, share


def code_score(pairs: Pairs, rule: str) -> dict[str, float]:
    """CodeBLEU (arXiv:2009.10297), weights 1/4.

    corrected: code as written, against the accepted answer that shares most tokens; a part that the
    references give nothing to compare for (no data flow, or none that parses) is left out and the
    others share its weight. published: code in lower case, against the first answer, and a data-flow
    part of 0 counts as 1 (and see `codebleu.parts`). Both read syntax with Python's own parser, where
    the published figures used one that tolerates errors: code that does not parse matches no syntax.
    """
    published = rule == "published"
    guesses = [text.lower() if published else text for text in pairs.predictions]
    if published:
        references = [target.lower() for target in pairs.targets()]
    else:
        references = [nearest(*pair) for pair in zip(guesses, pairs.answers, strict=True)]
    parts = codebleu.parts(references, guesses, published=published)
    known = {f"codebleu_{name}": part for name, part in parts.items() if part is not None}
    if published:
        value = sum(part or 0.0 for part in parts.values()) / 4 + (0.0 if parts["dataflow"] else 0.25)
    else:
        value = sum(known.values()) / len(known)
    equal = [guess == reference for guess, reference in zip(guesses, references, strict=True)]
    unparsed = [codebleu.parse(guess) is None for guess in guesses]
    return {"codebleu": value, "accuracy": share(equal), "invalid": share(unparsed), **known}


def nearest(guess: str, accepted: tuple[str, ...]) -> str:
    """The accepted answer with the largest share of tokens in common with the guess; the first of equals."""
    found = Counter(guess.split())

    def likeness(answer: str) -> float:
        wanted = Counter(answer.split())
        return (found & wanted).total() / max(1, found.total() + wanted.total())

    return max(accepted, key=likeness)
