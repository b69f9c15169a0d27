"""The SuperGLUE data sets (arXiv:1905.00537)."""

from __future__ import annotations

import re

from peftdyno.bench.task import Row, Task, cell, layout, text
from peftdyno.engine.errors import UserError

_HUB = "super_glue"
_FALSE_TRUE = ("false", "true")


def entities(row: Row) -> list[str]:
    """ReCoRD's entities, which must be a list of texts."""
    return _text_list(row, "entities")


def record_answers(row: Row) -> tuple[str, ...]:
    """ReCoRD's accepted answers; a row without any has nothing to learn from."""
    answers = _text_list(row, "answers")
    if not answers:
        raise UserError("column 'answers': the answer is empty")
    return tuple(answers)


def record_answer(row: Row) -> str:
    """The first accepted answer."""
    return record_answers(row)[0]


def record_input(row: Row) -> str:
    """Query, entities and the passage with its highlights run on as sentences."""
    passage = re.sub(r"\s*\n@highlight\n\s*", "\n", text(row, "passage"))
    sentences = [line if line[-1:] in ".!?\"'" else line + "." for line in passage.split("\n") if line]
    return f"Query: {text(row, 'query')}\nEntities: {', '.join(entities(row))}\nPassage: {' '.join(sentences)}"


def _text_list(row: Row, column: str) -> list[str]:
    value = cell(row, column)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"column '{column}' must be a list of texts, found {str(value)[:60]}")
    return value


def wsc_input(row: Row) -> str:
    """The sentence with its pronoun between asterisks and its noun between number signs."""
    marks = [("span1", "#"), ("span2", "*")]
    places = [(_span_start(row, span), len(text(row, f"{span}_text")), mark) for span, mark in marks]
    sentence = text(row, "text")
    for start, length, mark in sorted(places, reverse=True):
        stop = start + length
        sentence = f"{sentence[:start]}{mark} {sentence[start:stop]} {mark}{sentence[stop:]}"
    return sentence


def _span_start(row: Row, span: str) -> int:
    """Character at which a span starts, from the number of its first word."""
    words = list(re.finditer(r"\S+", text(row, "text")))
    number, wanted = cell(row, f"{span}_index"), text(row, f"{span}_text")
    if not isinstance(number, int) or not 0 <= number < len(words):
        raise UserError(f"column '{span}_index': {number} is not one of the {len(words)} words of 'text'")
    found = re.compile(r"\W*?" + re.escape(wanted)).match(text(row, "text"), words[number].start())
    if found is None:
        raise UserError(f"column '{span}_text': {wanted[:40]!r} does not stand at word {number} of 'text'")
    return found.end() - len(wanted)


def copa_input(row: Row) -> str:
    """Premise, what is asked of it, and the two alternatives."""
    asked = text(row, "question")
    if asked not in ("cause", "effect"):
        raise UserError(f"column 'question' must be 'cause' or 'effect', found {asked[:40]!r}")
    choices = f"Choice1: {text(row, 'choice1')}\nChoice2: {text(row, 'choice2')}"
    return f"Premise: {text(row, 'premise')}\nQuestion: What is the {asked}?\n{choices}"


TASKS = (
    Task(
        name="record",
        category="superglue",
        metric="answer_f1",
        hub_id=_HUB,
        subset="record",
        instruction=(
            "The query has a gap written @placeholder. "
            "Which entity of the passage fills it? Reply with the name of that entity."
        ),
        inputs=(record_input,),
        target=record_answer,
        answers_of=record_answers,
        max_new_tokens=32,
    ),
    Task(
        name="multirc",
        category="superglue",
        metric="f1",
        hub_id=_HUB,
        subset="multirc",
        instruction="Going by the paragraph, is the answer right? Reply with true or false.",
        inputs=(layout("Paragraph: {paragraph}\nQuestion: {question}\nAnswer: {answer}"),),
        labels=_FALSE_TRUE,
    ),
    Task(
        name="boolq",
        category="superglue",
        metric="f1",
        hub_id=_HUB,
        subset="boolq",
        instruction="Answer the question from the passage below it. Reply with true or false.",
        inputs=("question", "passage"),
        labels=_FALSE_TRUE,
    ),
    Task(
        name="wic",
        category="superglue",
        metric="f1",
        hub_id=_HUB,
        subset="wic",
        instruction="Does the word have the same sense in both sentences? Reply with true or false.",
        inputs=(layout("Word: {word}\nSentence1: {sentence1}\nSentence2: {sentence2}"),),
        labels=_FALSE_TRUE,
    ),
    Task(
        name="wsc",
        category="superglue",
        metric="f1",
        hub_id=_HUB,
        subset="wsc.fixed",
        instruction=(
            "Does the pronoun between asterisks stand for the words between number signs? Reply with true or false."
        ),
        inputs=(wsc_input,),
        labels=_FALSE_TRUE,
    ),
    Task(
        name="cb",
        category="superglue",
        metric="macro_f1",
        hub_id=_HUB,
        subset="cb",
        instruction=(
            "Is the hypothesis below the premise supported by it, denied by it, or left open? "
            "Reply with one word: entailment, contradiction or neutral."
        ),
        inputs=("premise", "hypothesis"),
        labels=("entailment", "contradiction", "neutral"),
    ),
    Task(
        name="copa",
        category="superglue",
        metric="f1",
        hub_id=_HUB,
        subset="copa",
        instruction="Which choice answers the question about the premise? Reply with choice1 or choice2.",
        inputs=(copa_input,),
        labels=("choice1", "choice2"),
    ),
)
