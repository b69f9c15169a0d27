"""Word problems and Python generation."""

from __future__ import annotations

import json

from peftdyno.bench.task import Row, SplitNames, Task, cell, layout, text
from peftdyno.engine.errors import UserError

_ON_TEST = SplitNames(test=("test",))


def svamp_equation(row: Row) -> str:
    """The equation with its value: '( 21.0 / 3.0 ) = 7.0'."""
    return f"{text(row, 'Equation')} = {text(row, 'Answer')}"


def conala_intent(row: Row) -> str:
    """The rewritten question, or the title as asked where nobody rewrote it."""
    rewritten = cell(row, "rewritten_intent")
    return text(row, "intent") if rewritten is None else text(row, "rewritten_intent")


def apps_input(row: Row) -> str:
    """The problem, and the code to start from where there is some."""
    return "\n".join(part for part in (text(row, "question"), text(row, "starter_code")) if part.strip())


def apps_solutions(row: Row) -> tuple[str, ...]:
    """All accepted programs, halves of surrogate pairs taken out; the column holds a list written as JSON."""
    try:
        solutions = json.loads(text(row, "solutions") or "[]")
    except (ValueError, RecursionError) as error:
        raise UserError(f"column 'solutions' is not JSON: {error}") from error
    if not isinstance(solutions, list) or not all(isinstance(item, str) for item in solutions):
        raise UserError("column 'solutions' must be a JSON list of programs")
    return tuple("".join(letter for letter in code if not "\ud800" <= letter <= "\udfff") for code in solutions)


def apps_solution(row: Row) -> str:
    """The first accepted program."""
    return next(iter(apps_solutions(row)), "")


def has_solution(row: Row) -> bool:
    """APPS has problems without any accepted program: nothing to learn or to compare with."""
    return bool(apps_solution(row).strip())


TASKS = (
    Task(
        name="math_qa",
        category="maths",
        metric="macro_f1",
        hub_id="allenai/math_qa",
        instruction="Solve the problem and pick the right option. Reply with its letter: a, b, c, d or e.",
        inputs=(layout("Problem: {Problem}\nOptions: {options}"),),
        target="correct",
        labels=("a", "b", "c", "d", "e"),
        first_label=None,
    ),
    Task(
        name="gsm8k",
        category="maths",
        metric="final_number",
        hub_id="openai/gsm8k",
        subset="main",
        splits=_ON_TEST,
        instruction="Solve this problem step by step. Write the result after '####' on a last line.",
        inputs=("question",),
        target="answer",
        max_new_tokens=384,
    ),
    Task(
        name="svamp",
        category="maths",
        metric="equation",
        hub_id="ChilleD/SVAMP",
        splits=_ON_TEST,
        instruction=(
            "Write the one equation that solves this problem, its left side in parentheses, "
            "in the manner of ( 2.0 + 3.0 ) = 5.0."
        ),
        inputs=("question_concat",),
        target=svamp_equation,
        max_new_tokens=48,
    ),
    Task(
        name="conala",
        category="code",
        metric="codebleu",
        hub_id="neulab/conala",
        subset="curated",
        splits=_ON_TEST,
        instruction="Write Python code that does the following.",
        inputs=(conala_intent,),
        target="snippet",
        max_new_tokens=128,
    ),
    Task(
        name="codealpacapy",
        category="code",
        metric="codebleu",
        hub_id="Abzu/CodeAlpacaPython",
        splits=_ON_TEST,
        instruction="Write Python code that does the following.",
        inputs=("prompt",),
        target="response",
        max_new_tokens=384,
    ),
    Task(
        name="apps",
        category="code",
        metric="codebleu",
        hub_id="codeparrot/apps",
        splits=_ON_TEST,
        instruction="Write a Python program that solves this problem.",
        inputs=(apps_input,),
        target=apps_solution,
        answers_of=apps_solutions,
        keep=has_solution,
        max_new_tokens=512,
    ),
)
