"""`peftdyno inspect`: what a task puts before a model, to the letter and the token."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Look"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno inspect --task gen-order",
    "peftdyno inspect --task sst2 --data DIR --count 5 --split test --json",
)
SPLITS = ("train", "validation", "test")


def command(
    task: Annotated[str, typer.Option("--task", "-t", help="See `peftdyno tasks`.")],
    model: o.Model = None,
    data: o.Data = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", help="Rows to show.", min=1)] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Divides train from validation.", min=0)] = 42,
    max_length: Annotated[int, typer.Option("--max-length", help="Longest sequence in tokens.", min=2)] = 2048,
    tasks_file: o.TasksFile = None,
    json_output: o.Json = False,
) -> None:
    """Print the exact text and token ids of a task's first rows; the tokens that carry a loss are marked."""
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.data import splits
    from peftdyno.bench.job import find_task
    from peftdyno.engine.errors import UserError, unknown
    from peftdyno.engine.sources import resolve_model
    from peftdyno.engine.tokenizer import Tokenizer

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    found = find_task(task, tasks_file)
    rows = getattr(splits(found, data, seed), split)[:count]
    files = resolve_model(model or o.DEFAULT_MODEL)
    if files.tokenizer_folder is None:
        raise UserError(f"model '{files.name}' has no tokenizer.json; a task needs one")
    tokenizer = Tokenizer.load(files.tokenizer_folder)
    shown = [_example(found, row, tokenizer, max_length, split) for row in rows]
    if json_output:
        print_json(shown)
    else:
        for number, example in enumerate(shown):
            _print(number, example, split)


def _example(task: Any, row: Any, tokenizer: Any, max_length: int, split: str) -> dict[str, Any]:
    from peftdyno.bench.rendering import prompt_text, test_prompt, training_example

    if split == "test":
        example, role = test_prompt(task, row, tokenizer, max_length), "test"
    else:
        example, role = training_example(task, row, tokenizer, max_length), "train"
    return {
        "prompt": prompt_text(task, row, tokenizer, role),
        "response": task.response(row),
        "answers": list(task.answers(row)),
        "tokens": list(example.tokens),
        "pieces": [tokenizer.decode([token], skip_special=False) for token in example.tokens],
        "num_prompt": example.num_prompt,
        "cut": example.cut,
    }


def _print(number: int, example: dict[str, Any], split: str) -> None:
    """The text as it is; then a line a token, `*` before those that are labels."""
    tokens, first = example["tokens"], example["num_prompt"]
    labels = len(tokens) - first
    print(f"--- {split} row {number}: {len(tokens)} tokens, {labels} of them labels, {example['cut']} cut")
    print(example["prompt"] + example["response"])
    print("accepted answers: " + " | ".join(example["answers"]))
    for i, (token, piece) in enumerate(zip(tokens, example["pieces"], strict=True)):
        print(f"{'*' if i >= first else ' '} {i:5d} {token:7d} {piece!r}")
    print()
