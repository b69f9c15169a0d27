"""Common-sense and knowledge questions with given choices."""

from __future__ import annotations

from peftdyno.bench.task import Row, SplitNames, Task, cell, layout, text, texts
from peftdyno.engine.errors import UserError

_LETTERS = ("A", "B", "C", "D")


def lettered(question: str, choices: list[str]) -> str:
    """A question and its choices, a letter each."""
    lines = [f"{letter}: {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return "\n".join([f"Question: {question}", *lines])


def mmlu_input(row: Row) -> str:
    """Question and four choices."""
    return lettered(text(row, "question"), texts(row, "choices", 4))


def openbookqa_input(row: Row) -> str:
    """Question stem and four choices; the columns keep the texts inside a structure."""
    choices = cell(row, "choices")
    if not isinstance(choices, dict) or "text" not in choices:
        raise UserError("column 'choices' must be a structure with 'text' and 'label'")
    if choices.get("label") not in (None, list(_LETTERS)):
        raise UserError(f"column 'choices': labels must be A B C D in order, found {choices['label']}")
    return lettered(text(row, "question_stem"), texts(choices, "text", 4))


def hellaswag_input(row: Row) -> str:
    """The start of a text and four endings."""
    endings = [f"Ending{number}: {ending}" for number, ending in enumerate(texts(row, "endings", 4), start=1)]
    return "\n".join([f"Text: {text(row, 'ctx')}", *endings])


TASKS = (
    Task(
        name="mmlu",
        category="reasoning",
        metric="macro_f1",
        hub_id="cais/mmlu",
        subset="all",
        splits=SplitNames(train="auxiliary_train"),
        instruction="Pick the right choice for this question. Reply with its letter: A, B, C or D.",
        inputs=(mmlu_input,),
        target="answer",
        labels=_LETTERS,
    ),
    Task(
        name="piqa",
        category="reasoning",
        metric="f1",
        hub_id="ybisk/piqa",
        instruction="Which of the two ways reaches the goal? Reply with solution1 or solution2.",
        inputs=(layout("Goal: {goal}\nSolution1: {sol1}\nSolution2: {sol2}"),),
        labels=("solution1", "solution2"),
    ),
    Task(
        name="siqa",
        category="reasoning",
        metric="macro_f1",
        hub_id="allenai/social_i_qa",
        instruction="Pick the best answer to the question about this situation. Reply with A, B or C.",
        inputs=(layout("Context: {context}\nQuestion: {question}\nA: {answerA}\nB: {answerB}\nC: {answerC}"),),
        labels=("A", "B", "C"),
        first_label=1,
    ),
    Task(
        name="hellaswag",
        category="reasoning",
        metric="macro_f1",
        hub_id="Rowan/hellaswag",
        instruction="How does the text go on? Reply with ending1, ending2, ending3 or ending4.",
        inputs=(hellaswag_input,),
        labels=("ending1", "ending2", "ending3", "ending4"),
    ),
    Task(
        name="winogrande",
        category="reasoning",
        metric="f1",
        hub_id="allenai/winogrande",
        subset="winogrande_xl",
        instruction="Which option belongs in the place of the underscore? Reply with option1 or option2.",
        inputs=(layout("Sentence: {sentence}\nOption1: {option1}\nOption2: {option2}"),),
        target="answer",
        labels=("option1", "option2"),
        first_label=1,
    ),
    Task(
        name="openbookqa",
        category="reasoning",
        metric="macro_f1",
        hub_id="allenai/openbookqa",
        subset="main",
        instruction="Pick the right choice for this science question. Reply with its letter: A, B, C or D.",
        inputs=(openbookqa_input,),
        target="answerKey",
        labels=_LETTERS,
        first_label=None,
    ),
)
