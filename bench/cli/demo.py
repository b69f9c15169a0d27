"""`peftdyno demo`: the whole story in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftdyno.bench.cli import options as o

PANEL = "Train and score"
EXAMPLES = (
    "peftdyno demo",
    "peftdyno demo --methods lora,prompt-tuning --tasks gen-order,gen-extract --out runs/two",
)


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="Built-in name, folder, .gguf file or hub id.")] = (
        o.DEFAULT_MODEL
    ),
    methods: Annotated[
        str | None, typer.Option("--methods", help="Names with commas; the quick ones by default.", metavar="A,B")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Names with commas.", metavar="A,B")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each run.", min=1)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; runs/demo by default.")] = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune SmolLM2-135M with several methods, score it before and after, and compare what they cost.

    Takes some minutes on two cores and needs neither data nor a model hub. The same command goes on where a stopped
    one was, and answers at once when all is done.
    """
    from peftdyno.bench import demo
    from peftdyno.bench.cli.bench import sweep
    from peftdyno.bench.cli.console import ERR, print_json
    from peftdyno.bench.cli.report import names, show
    from peftdyno.bench.report import compare, write_pages
    from peftdyno.bench.report.collection import collect

    chosen, where = names(methods) or demo.METHODS, out or demo.FOLDER
    values = demo.sweep_values(model, chosen, names(tasks) or demo.TASKS, steps or demo.STEPS)
    if not quiet:
        print(
            f"{len(chosen)} methods on {', '.join(values['tasks'])}, {values['steps']} steps each: {where}", flush=True
        )
    outcome = sweep(values, where, "auto", quiet)
    if outcome.trained or outcome.skipped:
        comparison = compare(collect(where))
        paths = write_pages(comparison, where)
        if json_output:
            print_json(comparison.as_json())
        else:
            show(comparison, paths)
            print(demo.CAVEAT)
    for name, reason in outcome.failed.items():
        ERR.print(f"failed: {name}: {reason}", highlight=False)
    if outcome.failed:
        raise typer.Exit(1)
    if json_output:
        return
    _next_steps(where, chosen[0], values["tasks"][0])


def _next_steps(where: Path, method: str, task: str) -> None:
    adapter = where / "runs" / method / task / "seed-42" / "adapter"
    lines = (
        ("the same figures with plots", f"open {where / 'report.html'}"),
        ("what the model was asked, to the token", f"peftdyno inspect --task {task}"),
        ("the tuned model again", f"peftdyno eval --adapter {adapter} --task {task} --out runs/eval"),
        ("your own run", "peftdyno train --task sst2 --data DIR --steps 300 --batch 8 --out runs/sst2"),
        ("everything else", "peftdyno -h"),
    )
    print("\nNext:")
    for what, line in lines:
        print(f"  {line}  # {what}")
