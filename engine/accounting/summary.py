"""Summary: a finished ledger as plain dictionaries, the way run.json holds them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter as Occurrences
from collections.abc import Sequence
from typing import Any

from peftdyno.engine.accounting.ledger import WARM_UP_STEPS, Ledger
from peftdyno.engine.accounting.memory_predict import training_memory
from peftdyno.engine.accounting.pack_shape import PackShape, largest
from peftdyno.engine.accounting.predict import Job, training_step
from peftdyno.engine.accounting.scope import Phase
from peftdyno.engine.accounting.tally import Tally, nested

CONVENTIONS = {
    "attention": "causal: the pairs that are attended, exactly",
    "multiply_add": "2 FLOPs",
    "classes": "matrix, pointwise and reduction together",
}


def summary(ledger: Ledger) -> dict[str, Any]:
    """What a finished training cost, by the three kinds of figure.

    `flops`: {predicted, counted: {phase: {owner: integer}}, conventions}, of the sampled steps, which must be equal.
    `flops_by_class`: the same by class, `matrix_full` being matrix FLOPs under the full-square convention.
    `memory`: {predicted_peak_bytes, predicted_by_category} of the largest packs. `time`: {phase: {median, p10, p90,
    total, count}} in seconds over the timed steps after warm-up. `steps`: how many there were of each kind.
    """
    shapes = {shape for step in ledger.packs for shape in step}
    memory = predicted_memory(ledger, tuple(shapes))
    return {**flops_summary(ledger), "memory": memory, "time": times(ledger), "steps": _steps(ledger)}


def _steps(ledger: Ledger) -> dict[str, Any]:
    timed = len(ledger.clock.read())
    return {
        "finished": ledger.num_steps,
        "counted": list(ledger.sampled),
        "timed": max(timed - WARM_UP_STEPS, 0),
        "warm_up": min(timed, WARM_UP_STEPS),
        "tokens": sum(ledger.tokens),
    }


def times(ledger: Ledger) -> dict[str, dict[str, float]]:
    """Seconds a step by phase over the timed steps after warm-up; a phase is summarised over the steps it ran in."""
    kept = ledger.clock.read()[WARM_UP_STEPS:]
    phases: dict[Phase, list[float]] = {}
    for step in kept:
        for phase, seconds in step.items():
            phases.setdefault(phase, []).append(seconds)
    return {phase: spread(values) for phase, values in phases.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, total and number of some seconds."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values] * 9
    return {
        "median": statistics.median(values),
        "p10": tenths[0],
        "p90": tenths[-1],
        "total": sum(values),
        "count": len(values),
    }


def flops_summary(ledger: Ledger) -> dict[str, Any]:
    """`flops`, `flops_by_class` and `flops_equal_by_layer` of the sampled steps; empty where nothing was counted."""
    if ledger.counter is None or ledger.subject is None or not ledger.sampled:
        return {}
    counted, predicted = ledger.counter.tally, predicted_tally(ledger, ledger.sampled)
    kinds = {"predicted": predicted, "counted": counted}
    by_class = {kind: nested(tally.by("phase", "owner")) for kind, tally in kinds.items()}
    return {
        "flops": {**{kind: figures(tally) for kind, tally in kinds.items()}, "conventions": CONVENTIONS},
        "flops_by_class": by_class,
        "flops_equal_by_layer": counted.by("phase", "owner", "layer") == predicted.by("phase", "owner", "layer"),
    }


def figures(tally: Tally) -> dict[str, dict[str, int]]:
    """{phase: {owner: FLOPs of all classes}} with causal attention."""
    table: dict[str, dict[str, int]] = {}
    for (phase, owner), charge in sorted(tally.by("phase", "owner").items()):
        table.setdefault(str(phase), {})[str(owner)] = charge.flops
    return table


def predicted_tally(ledger: Ledger, steps: Sequence[int]) -> Tally:
    """Costs of the given steps, predicted from the shapes of their packs."""
    job, total = subject_job(ledger), Tally()
    for shapes, times_seen in Occurrences(ledger.packs[step] for step in steps).items():
        step_tally = training_step(job, [shape.pack() for shape in shapes])
        for _ in itertools.repeat(None, times_seen):
            total.merge(step_tally)
    return total


def predicted_memory(ledger: Ledger, shapes: Sequence[PackShape]) -> dict[str, Any]:
    """Peak of the training step whose packs are the largest of `shapes`; on the CPU with the scratch of its matrix
    library, which is measured. Empty where there is no shape."""
    if ledger.subject is None or not shapes:
        return {}
    job = subject_job(ledger)
    logs = [training_memory(job, [shape.pack()], probe=True) for shape in largest(shapes, job.config)]
    highest = max(logs, key=lambda log: log.peak_bytes)
    categories = highest.by_category(highest.peak_index)
    categories["base weights"] += ledger.panel_bytes
    return {"predicted_peak_bytes": sum(categories.values()), "predicted_by_category": categories}


def subject_job(ledger: Ledger) -> Job:
    """What the ledger's figures are predicted for."""
    subject = ledger.subject
    assert subject is not None, "the ledger does not know whose costs it holds"
    return Job(
        config=subject.config,
        methods=subject.methods,
        dtype=subject.dtype,
        device=subject.device.type,
        quant=subject.quant,
        activations=subject.activations,
    )
