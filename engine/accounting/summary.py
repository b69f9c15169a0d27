"""Summary: a finished ledger as plain dictionaries, the way run.json holds them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter as Occurrences
from collections.abc import Sequence
from typing import Any

from peftdyno.engine.accounting.ledger import WARM_UP_STEPS, Ledger
from peftdyno.engine.accounting.predict import Job, training_step
from peftdyno.engine.accounting.scope import Phase
from peftdyno.engine.accounting.tally import Tally, nested


def summary(ledger: Ledger) -> dict[str, Any]:
    """`flops`, `time`, `steps` of a finished training.

    flops.counted and flops.predicted are {phase: {owner: {class: integer}}} summed over the sampled steps and must be
    equal; `matrix` is causal attention, `matrix_full` the full square. time is {phase: {median, p10, p90, total}} in
    seconds over the timed steps after warm-up.
    """
    return {"flops": _flops(ledger), "time": times(ledger), "steps": _steps(ledger)}


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


def _flops(ledger: Ledger) -> dict[str, Any]:
    if ledger.counter is None or ledger.subject is None or not ledger.sampled:
        return {}
    counted, predicted = ledger.counter.tally, predicted_tally(ledger, ledger.sampled)
    return {
        "convention": "matrix: causal attention over exact pairs; matrix_full: full square",
        "steps": list(ledger.sampled),
        "counted": nested(counted.by("phase", "owner")),
        "predicted": nested(predicted.by("phase", "owner")),
        "equal_by_layer": counted.by("phase", "owner", "layer") == predicted.by("phase", "owner", "layer"),
    }


def predicted_tally(ledger: Ledger, steps: Sequence[int]) -> Tally:
    """Costs of the given steps, predicted from the shapes of their packs."""
    subject = ledger.subject
    assert subject is not None, "the ledger does not know whose costs it holds"
    job = Job(
        config=subject.config,
        methods=subject.methods,
        dtype=subject.dtype,
        device=subject.device.type,
        quant=subject.quant,
    )
    total = Tally()
    for shapes, times_seen in Occurrences(ledger.packs[step] for step in steps).items():
        step_tally = training_step(job, [shape.pack() for shape in shapes])
        for _ in itertools.repeat(None, times_seen):
            total.merge(step_tally)
    return total
