"""`peftdyno train`, also installed as `engine-train`: fine-tune, score, and write the record of the run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Train and score"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno train --task gen-order --method lora --steps 200 --batch 8 --out runs/order",
    "peftdyno train --model smollm2-135m --method lora --task sst2 --data DIR --steps 300 --batch 8 --out RUN",
    "peftdyno train --task sst2 --data DIR --seed 42,123,456 --set lora.rank=8 --set lora.dropout=0 --out RUN",
    "peftdyno train --config job.yaml --out RUN",
)


def command(
    model: o.Model = None,
    method: Annotated[str | None, typer.Option("--method", help="See `peftdyno methods`.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="See `peftdyno tasks`.")] = None,
    data: o.Data = None,
    out: o.Out = None,
    seed: Annotated[str | None, typer.Option("--seed", help="One or several, e.g. 42,123; 42 by default.")] = None,
    steps: o.Steps = None,
    epochs: o.Epochs = None,
    batch: o.Batch = None,
    micro_batch: o.MicroBatch = None,
    activations: o.Activations = None,
    memory_limit: o.MemoryLimit = None,
    learning_rate: o.LearningRate = None,
    max_length: o.MaxLength = None,
    share_prefix: o.SharePrefix = None,
    limit_train: o.LimitTrain = None,
    limit_validation: o.LimitValidation = None,
    limit_test: o.LimitTest = None,
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    device: o.Device = None,
    kernels: o.Kernels = None,
    graphs: o.Graphs = None,
    pack_weights: o.JobPackWeights = None,
    threads: o.Threads = None,
    tasks_file: o.TasksFile = None,
    no_eval: o.NoEval = False,
    config: o.Config = None,
    sets: o.Sets = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fine-tune a model on a task, score it before and after, and write what it cost.

    Writes OUT/run.json, OUT/adapter/ (PEFT's format), OUT/metrics.jsonl and OUT/predictions.jsonl; with several
    seeds, which train together in one pass, a folder a seed. The same command goes on where a killed one stopped.
    """
    given = {name: value for name, value in locals().items() if name not in NOT_SETTINGS}
    given["seeds"] = o.seeds(seed)
    given["evaluate"] = False if no_eval else None
    run(given, out, config, sets or [], json_output, quiet)


NOT_SETTINGS = ("out", "seed", "no_eval", "config", "sets", "json_output", "quiet")
"""Options that are not settings of the job under their own name."""


def run(given: dict[str, Any], out: Any, config: Any, sets: list[str], json_output: bool, quiet: bool) -> None:
    """Settings to records, then the records on the terminal."""
    from peftdyno.bench.settings import gather, make_settings
    from peftdyno.engine.errors import UserError

    values = gather(given, config, sets, renamed={"seed": "seeds"})
    values.setdefault("model", o.DEFAULT_MODEL)
    if isinstance(values.get("seeds"), int):
        values["seeds"] = (values["seeds"],)
    if "task" not in values:
        raise UserError("--task is missing; `peftdyno tasks` lists them")
    if out is None:
        raise UserError("--out is missing; give a folder for the run")
    settings = make_settings(values)
    from peftdyno.bench.base_model import load_base, use_hardware
    from peftdyno.bench.cli.console import progress_for
    from peftdyno.bench.job import Job, Places, finished_records, run_job
    from peftdyno.engine.sources import resolve_config

    resolve_config(settings.model)  # a wrong name is told before any data is read
    job = Job.prepare(settings)
    use_hardware(settings.threads, settings.kernels)
    progress = progress_for(quiet)
    base = load_base(settings.model, settings.dtype, settings.device, settings.quant)
    places = Places.under(out, settings.seeds)
    records = finished_records(job, base, places)
    if records is None:
        records = run_job(job, base, places, progress)
    else:
        progress.say(f"{out} is finished already; nothing to do")
    show(records, [str(path) for path in places.runs], json_output)


def show(records: list[Any], folders: list[str], json_output: bool) -> None:
    """The runs' main figures."""
    from peftdyno.bench.cli.console import print_json, print_table

    if json_output:
        plain = [record.model_dump(mode="json", exclude_none=True) for record in records]
        print_json(plain[0] if len(plain) == 1 else plain)
        return
    header = ("run", "untuned", "tuned", "trainable", "training memory", "seconds a step", "seconds in all")
    rows = []
    for folder, record in zip(folders, records, strict=True):
        memory = record.pscp_inputs.memory_gb
        rows.append(
            (
                folder,
                percent(record.baseline()),
                percent(record.score()),
                f"{record.parameters.trainable:,}",
                "" if memory is None else f"{memory:.2f} GB",
                f"{record.time['step_median']:.3f}" if "step_median" in record.time else "",
                f"{record.time['total']:.0f}",
            )
        )
    print_table(header, rows, title=f"{records[0].method['name']} on {records[0].task['name']}")
    for record in records:
        for event in record.events:
            print(event)


def percent(value: float | None) -> str:
    """A fraction of 1 as a percentage, empty where there is none."""
    return "" if value is None else f"{100 * value:.2f}%"
