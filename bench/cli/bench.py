"""`peftdyno bench`: methods x tasks x seeds on one model, finished runs skipped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Compare"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno bench --methods lora,ia3 --tasks gen-order,gen-extract --seeds 42,123 --steps 200 --out SWEEP",
    "peftdyno bench --methods lora,ia3 --tasks sst2,rte --data DIR --set ia3.learning_rate=5e-3 --out SWEEP",
    "peftdyno bench --config sweep.yaml --together 4 --out SWEEP && peftdyno report SWEEP",
)
NOT_SETTINGS = ("out", "no_eval", "config", "sets", "json_output", "quiet", "together")


def command(
    model: o.Model = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Names with commas.", metavar="A,B")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Names with commas.", metavar="A,B")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Numbers with commas; 42 by default.")] = None,
    data: o.Data = None,
    out: o.Out = None,
    together: Annotated[
        str, typer.Option("--together", help="Seeds that train in one pass: auto (all of them) or a number.")
    ] = "auto",
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
    config: o.Config = None,
    sets: o.Sets = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a grid of methods, tasks and seeds; `peftdyno report` then compares the methods.

    The seeds of a method and task train in one pass over the frozen model. Finished runs are skipped, a failed one is
    recorded and does not stop the others; the exit status is 1 if any failed. The same command goes on where a
    killed one stopped, and a larger grid adds to the folder.
    """
    given = {name: value for name, value in locals().items() if name not in NOT_SETTINGS}
    from peftdyno.bench.settings import gather
    from peftdyno.engine.errors import UserError

    values = gather(given, config, sets or [])
    values.setdefault("model", o.DEFAULT_MODEL)
    values.setdefault("seeds", [42])
    if out is None:
        raise UserError("--out is missing; give a folder for the sweep")
    outcome = sweep(values, out, _group_size(together), quiet)
    _show(outcome, str(out), json_output)
    if outcome.failed:
        raise typer.Exit(1)


def sweep(values: dict[str, Any], out: Any, together: Any, quiet: bool) -> Any:
    """Plan, load the model once, run; the outcome."""
    from peftdyno.bench.base_model import load_base, use_hardware
    from peftdyno.bench.cli.console import progress_for
    from peftdyno.bench.sweep import Sweep

    plan = Sweep.plan(out, values, together)
    settings = plan.cells[0].settings
    use_hardware(settings.threads, settings.kernels)
    return plan.run(load_base(settings.model, settings.dtype, settings.device, settings.quant), progress_for(quiet))


def _group_size(text: str) -> Any:
    from peftdyno.engine.errors import UserError

    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--together {text}: give auto or a number from 1 on")
    return int(text)


def _show(outcome: Any, out: str, json_output: bool) -> None:
    from peftdyno.bench.cli.console import print_json

    if json_output:
        print_json({"trained": outcome.trained, "skipped": outcome.skipped, "failed": outcome.failed, "out": out})
        return
    print(f"{len(outcome.trained)} trained, {len(outcome.skipped)} finished before, {len(outcome.failed)} failed")
    for name, reason in outcome.failed.items():
        print(f"failed: {name}: {reason}")
    print(f"peftdyno report {out}")
