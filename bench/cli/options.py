"""Options that several commands share; a value that was not given is None and leaves the setting at its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_MODEL = "smollm2-135m"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Built-in name, folder, .gguf file or hub id.", metavar="NAME")
]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of TASK/SPLIT.jsonl[.gz] or .parquet; the hub otherwise.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to.")]
TasksFile = Annotated[Path | None, typer.Option("--tasks-file", help="Tasks in LLaMA-Factory's dataset_info format.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings in a YAML file; options override it.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A setting or one of the method's, e.g. lora.rank=8.", metavar="NAME=VALUE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps; or give --epochs.")]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the train split; 10 by default.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Sequences of each run in a step; 4 by default.")]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch", help="Sequences of each run computed at a time.")]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Kept for the backward pass: keep (all), cheap (no pointwise results), recompute (layers' inputs).",
        metavar="POLICY",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option("--memory-limit", help="Train in the fastest way that fits, e.g. 8GiB, 900MB or 2e9.", metavar="SIZE"),
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help="Peak rate; the method's own by default.")
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Longest sequence in tokens; prompts are cut. 2048 by default.")
]
SharePrefix = Annotated[
    str | None,
    typer.Option("--share-prefix", help="Compute a prefix that sequences share once: auto, on, off.", metavar="WHEN"),
]
Graphs = Annotated[
    str | None,
    typer.Option(
        "--graphs", help="Record training steps and replay them: auto (in long trainings), on, off.", metavar="WHEN"
    ),
]
LimitTrain = Annotated[int | None, typer.Option("--limit-train", help="Random rows to train on; all by default.")]
LimitValidation = Annotated[
    int | None, typer.Option("--limit-validation", help="Random validation rows, 256 by default; 0 for all.")
]
LimitTest = Annotated[int | None, typer.Option("--limit-test", help="Random test rows; all by default.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16 (the default) or fp32.")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="Store frozen weights in 4 bits: nf4 or nf4-double.", metavar="KIND")
]
Device = Annotated[str | None, typer.Option("--device", help="auto (the default), cpu or cuda.")]
Kernels = Annotated[
    str | None, typer.Option("--kernels", help="auto (the default), reference, cpu or triton; never falls back.")
]
JobPackWeights = Annotated[
    str | None,
    typer.Option(
        "--pack-weights",
        help="Weights again, as products on CPUs with bf16 read them fastest: auto (where memory is free), on, off.",
        metavar="WHEN",
    ),
]
PackWeights = Annotated[
    str,
    typer.Option(
        "--pack-weights",
        help="Weights a second time for faster decoding on CPUs with bf16: auto (where memory is free), on, off.",
        metavar="WHEN",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads.", min=1)]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Train only; neither model is scored.")]


def seeds(text: str | None) -> tuple[int, ...] | None:
    """`42,123` as numbers."""
    from peftdyno.engine.errors import UserError

    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--seed {text}: give whole numbers with commas, e.g. 42,123") from None


def pack_weights(name: str) -> Any:
    """The choice; UserError for another word."""
    from peftdyno.engine.errors import unknown

    if name not in ("auto", "on", "off"):
        raise unknown("--pack-weights", name, ("auto", "on", "off"))
    return name


def dtype(name: str | None) -> str:
    """The name of a compute dtype, bf16 where none is given."""
    from peftdyno.engine.errors import unknown

    if name not in (None, "bf16", "fp32"):
        raise unknown("--dtype", name, ("bf16", "fp32"))
    return name or "bf16"
