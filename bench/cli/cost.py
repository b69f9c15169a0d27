"""`peftdyno cost`: parameters, FLOPs and memory of a method on a model, from the config alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Costs"
EXAMPLES = (
    "peftdyno cost --model llama-3-8b --method lora --batch 1 --seq 512",
    "peftdyno cost --model llama-3-8b --method all",
    "peftdyno cost --model smollm2-135m --method lora --set lora.rank=8 --batch 4 --json",
    "peftdyno cost --model llama-3-8b --method lora --batch 8 --memory-limit 24GiB",
)
TERA = 1e12


def command(
    model: o.Model = None,
    method: Annotated[
        str, typer.Option("--method", help="A name, names with commas, or all; see `peftdyno methods`.")
    ] = "lora",
    batch: Annotated[int, typer.Option("--batch", help="Sequences of each run.", min=1)] = 1,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.", min=2)] = 512,
    runs: Annotated[int, typer.Option("--runs", help="Runs trained together in one bank.", min=1)] = 1,
    activations: o.Activations = None,
    memory_limit: o.MemoryLimit = None,
    sets: o.Sets = None,
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    device: o.Device = None,
    json_output: o.Json = False,
) -> None:
    """Predict what training and inference cost; needs no weights, and no files for a built-in shape."""
    import torch

    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.cost import Limits, cost_report, methods_named
    from peftdyno.engine.accounting.predict import Job
    from peftdyno.engine.activations import POLICIES
    from peftdyno.engine.sources import resolve_config

    name = model or o.DEFAULT_MODEL
    config = resolve_config(name)
    width = {"bf16": torch.bfloat16, "fp32": torch.float32}[o.dtype(dtype)]
    reports = {}
    for cls in methods_named(method):
        given = {"activations": activations, "memory_limit": memory_limit}
        settings = _settings(name, cls.name, given, sets or [])
        job = Job(
            config=config,
            methods=(settings.build_method(),) * runs,
            dtype=width,
            device=_device(device),
            quant=quant,
            activations=settings.activations or "keep",
        )
        limits = None
        if settings.memory_limit is not None:
            limits = Limits(settings.memory_limit, (settings.activations,) if settings.activations else POLICIES)
        reports[cls.name] = {"model": name, "dtype": o.dtype(dtype), **cost_report(job, batch, seq, limits)}
    if json_output:
        print_json(next(iter(reports.values())) if len(reports) == 1 else reports)
    elif len(reports) == 1:
        _print_one(next(iter(reports.values())))
    else:
        _print_many(reports)


def _device(name: str | None) -> str:
    """The type of device to predict for: the CPU unless another is named."""
    from peftdyno.engine.errors import unknown

    if name not in (None, "auto", "cpu", "cuda"):
        raise unknown("--device", str(name), ("cpu", "cuda"))
    return "cuda" if name == "cuda" else "cpu"


def _settings(model: str, name: str, given: dict[str, Any], sets: list[str]) -> Any:
    """The options, and those of the settings that are the method's own; UserError for a setting of no method asked
    for."""
    from peftdyno.bench.settings import gather, make_settings

    own = [text for text in sets if text.partition(".")[0] == name or "." not in text]
    return make_settings(gather({"model": model, "method": name, "task": "cost", **given}, None, own))


def _print_one(report: dict[str, Any]) -> None:
    from peftdyno.bench.cli.console import OUT, print_table

    parameters = report["parameters"]
    share = parameters["trainable"] / parameters["base"]
    OUT.print(f"{report['method']} on {report['model']}, {report['dtype']}: {_setup(report)}", highlight=False)
    OUT.print(
        f"{parameters['trainable']:,} parameters trained ({share:.3%} of {parameters['base']:,}), "
        f"{parameters['stored']:,} stored, {parameters['inference']:,} read by inference before merging",
        highlight=False,
    )
    training = [
        (phase, owner, *_flop_columns(values))
        for phase, owners in report["training"]["flops"].items()
        for owner, values in owners.items()
    ]
    header = ("matrix, causal", "matrix, full square", "pointwise", "reduction", "GB moved")
    print_table(("phase", "owner", *header), training, title="A training step, TFLOP")
    inference = [
        (phase, kind, *_flop_columns(values), f"{values.get('above_base', 0) / TERA:.6f}")
        for kind, phases in report["inference"].items()
        if isinstance(phases, dict)
        for phase, values in phases.items()
    ]
    print_table(("phase", "model", *header, "above base"), inference, title="Inference, TFLOP; decode is one token")
    if "not_mergeable" in report["inference"]:
        OUT.print(report["inference"]["not_mergeable"], highlight=False)
    memory = report["training"]["memory"]
    rows = [(name, f"{value / 1e9:.3f}") for name, value in memory["by_category"].items()]
    at = memory["at"]
    title = f"Training memory: {memory['predicted_peak_bytes'] / 1e9:.3f} GB at the peak"
    print_table(("category", "GB"), rows, title=f"{title} ({at['phase']}, layer {at['layer']}, {at['operator']})")
    if "predicted_reserved_bytes" in memory:
        OUT.print(f"{memory['predicted_reserved_bytes'] / 1e9:.3f} GB reserved by PyTorch's allocator", highlight=False)
    if "not_exact" in memory:
        OUT.print(memory["not_exact"], highlight=False)
    if "within_limit" in report["training"]:
        OUT.print(report["training"]["within_limit"]["says"], highlight=False)


def _setup(report: dict[str, Any]) -> str:
    runs = f", {report['runs']} runs together" if report["runs"] > 1 else ""
    return f"batch {report['batch']} x {report['length']} tokens{runs}, activations {report['activations']}"


def _flop_columns(values: dict[str, int]) -> tuple[str, ...]:
    names = ("matrix", "matrix_full", "pointwise", "reduction")
    return (*(f"{values[name] / TERA:.6f}" for name in names), f"{values['bytes'] / 1e9:.3f}")


def _print_many(reports: dict[str, dict[str, Any]]) -> None:
    from peftdyno.bench.cli.console import print_table

    first = next(iter(reports.values()))
    rows = []
    for name, report in reports.items():
        inference, flops = report["inference"], report["training"]["flops"]
        step = sum(values["matrix"] for owners in flops.values() for values in owners.values())
        merged = inference.get("merged")
        rows.append(
            (
                name,
                f"{report['parameters']['trainable']:,}",
                f"{step / TERA:.5f}",
                f"{inference['unmerged']['forward']['matrix'] / TERA:.5f}",
                f"{inference['unmerged']['forward']['matrix_full'] / TERA:.5f}",
                f"{inference['unmerged']['forward']['above_base'] / TERA:.5f}",
                "" if merged is None else f"{merged['forward']['above_base'] / TERA:.5f}",
                f"{inference['unmerged']['decode']['total'] / 1e9:.3f}",
                f"{report['training']['memory']['predicted_peak_bytes'] / 1e9:.3f}",
            )
        )
    header = (
        "method", "trained", "step, TFLOP", "forward, causal", "forward, full square", "above base", "merged",
        "GFLOP a token", "training GB",
    )  # fmt: skip
    print_table(header, rows, title=f"{first['model']}, {first['dtype']}: {_setup(first)}")
    if "not_exact" in first["training"]["memory"]:
        print(first["training"]["memory"]["not_exact"])
    for name, report in reports.items():
        if "within_limit" in report["training"]:
            print(f"{name}: {report['training']['within_limit']['says']}")
