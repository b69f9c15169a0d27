"""The README of an adapter's folder: settings, and what the run measured."""

from __future__ import annotations

from pathlib import Path

from peftdyno.bench.store import RunRecord
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import CARD_FILE, model_card
from peftdyno.engine.atomic import whole_file

GB = 1e9


def write(folder: Path, bank: AdapterBank, run: int, model: str, record: RunRecord) -> None:
    """Write the card with the costs of the record, in place of the one without."""
    with whole_file(folder / CARD_FILE) as temporary:
        temporary.write_text(model_card(bank, run, model, costs(record)), encoding="utf-8")


def costs(record: RunRecord) -> str:
    """What the run cost and scored, as Markdown."""
    rows = [*_scores(record), *_sizes(record), *_resources(record)]
    table = ["| figure | value | kind |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    hardware = [record.machine["processor"], f"{record.machine['threads']} threads", *record.machine.get("gpus", [])]
    where = ", ".join(str(part) for part in hardware)
    lines = [
        f"## {record.task['name']}, seed {record.seed}",
        "",
        f"{record.steps} steps of batch {record.settings['batch']} on {record.data['train']['rows_used']} rows of "
        f"{record.data['train']['location']}; {record.runs_together} run(s) in one pass.",
        "",
        *table,
        "",
        f"Measured on {where}, with torch {record.versions['torch']}. All figures are in run.json, with the "
        "command that made them.",
    ]
    return "\n".join(lines)


def _scores(record: RunRecord) -> list[tuple[str, str, str]]:
    named = [("tuned", record.score()), ("untuned", record.baseline())]
    return [
        (f"{record.main_metric}, {which} model", f"{100 * value:.2f}%", "measured")
        for which, value in named
        if value is not None
    ]


def _sizes(record: RunRecord) -> list[tuple[str, str, str]]:
    return [(f"{name} parameters", f"{value:,}", "exact") for name, value in record.parameters.model_dump().items()]


def _resources(record: RunRecord) -> list[tuple[str, str, str]]:
    rows = [
        (name.replace("_", " ").removesuffix(" bytes"), f"{value / GB:.3f} GB", _kind(name))
        for name, value in record.memory.model_dump(exclude_none=True, exclude={"predicted_by_category"}).items()
    ]
    rows += [(f"{phase}, all steps", f"{value:.1f} s", "measured") for phase, value in _phases(record).items()]
    for kind in ("predicted", "counted") if record.flops is not None else ():
        for phase, owners in getattr(record.flops, kind).items():
            name = f"{phase}, FLOPs of {len(record.flops.steps)} step(s)"
            rows.append((name, f"{sum(owners.values()):,}", kind))
    if record.flops is not None and record.flops.total is not None:
        total = record.flops.total
        rows.append((f"matrix FLOPs of all {total.steps} steps", f"{total.sum():,}", total.kind))
    if record.energy is not None:
        rows += [(f"energy, {phase}", f"{value:.1f} J", "measured") for phase, value in record.energy.joules.items()]
    above = record.pscp_inputs.inference_tflop_above_base
    if above is not None:
        rows.append(("inference above the base model, 1 x 512 tokens", f"{above:.6f} TFLOP", "predicted"))
    return rows


def _kind(name: str) -> str:
    return "predicted" if name.startswith("predicted") else "measured"


def _phases(record: RunRecord) -> dict[str, float]:
    return {name: value for name, value in record.time.items() if not name.startswith("step_")}
