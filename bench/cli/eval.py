"""`peftdyno eval`: score a model, alone or with adapters, on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Train and score"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno eval --model smollm2-135m --task gen-order --out runs/untuned",
    "peftdyno eval --adapter RUN/adapter --task sst2 --data DIR --out runs/tuned",
    "peftdyno eval --adapter A/adapter --adapter B/adapter --task sst2 --data DIR --out runs/both",
)


def command(
    task: Annotated[str, typer.Option("--task", "-t", help="See `peftdyno tasks`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")],
    model: o.Model = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", "-a", help="Adapter folder; several are scored in one batch.")
    ] = None,
    data: o.Data = None,
    limit_test: o.LimitTest = None,
    batch: Annotated[int, typer.Option("--batch", help="Rows of each adapter at a time.", min=1)] = 32,
    max_length: Annotated[int, typer.Option("--max-length", help="Longest sequence in tokens.", min=2)] = 2048,
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    device: o.Device = None,
    kernels: o.Kernels = None,
    pack_weights: o.PackWeights = "auto",
    threads: o.Threads = None,
    tasks_file: o.TasksFile = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score the test rows of a task and write OUT/eval.json and the predictions.

    Several adapters of one method share each batch and one copy of the model. A killed scoring goes on with the
    same command. Without --model it is the one that the adapter names.
    """
    from peftdyno.bench.base_model import load_base, use_hardware
    from peftdyno.bench.cli.console import progress_for
    from peftdyno.bench.data import load_test
    from peftdyno.bench.job import find_task
    from peftdyno.bench.scoring import Scoring, base_name, score

    found = find_task(task, tasks_file)
    adapters = tuple(adapter or ())
    rows = load_test(found, data, limit_test or None)
    packed = o.pack_weights(pack_weights)
    scoring = Scoring(task=found, test=rows, adapters=adapters, batch=batch, max_length=max_length, pack_weights=packed)
    use_hardware(threads, kernels or "auto")
    name = model or (base_name(adapters[0]) if adapters else o.DEFAULT_MODEL)
    base = load_base(name, o.dtype(dtype), device or "auto", quant)
    _show(score(scoring, base, out, progress_for(quiet)), json_output)


def _show(record: dict[str, Any], json_output: bool) -> None:
    from peftdyno.bench.cli.console import print_json, print_table

    if json_output:
        print_json(record)
        return
    rows = []
    for result in record["results"]:
        corrected, published = result["scores"]["corrected"], result["scores"]["published"]
        names = list(corrected)
        cells = ["" if corrected[name] is None else f"{100 * corrected[name]:.2f}" for name in names]
        main = published[record["task"]["metric"]]
        rows.append((result.get("adapter", result["name"]), *cells, "" if main is None else f"{100 * main:.2f}"))
    header = ("", *(f"{name} %" for name in names), f"{record['task']['metric']} as published %")
    print_table(header, rows, title=f"{record['task']['name']}, {record['data']['rows_used']} rows")
