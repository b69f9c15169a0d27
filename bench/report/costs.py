"""What the runs of a method took beside their score: memory predicted and measured, FLOPs of all steps, energy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftdyno.bench.store import RunRecord

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Means over a method's runs; None where a run lacks the figure. What runs trained together used is divided among
    them, but for memory."""

    predicted_gb: float | None
    """Peak of live tensors in a training step."""
    measured_gb: float | None
    memory_ratio: float | None
    """Predicted over measured."""
    resident_gb: float | None
    """Peak of the whole process."""
    training_tflop: float | None
    """Matrix FLOPs of all training steps, predicted."""
    joules: float | None
    """Measured, training and scoring."""


def costs_of(records: Sequence[RunRecord]) -> Costs:
    """The costs of one method's runs."""
    return Costs(
        predicted_gb=mean(records, lambda r: _gb(r.memory.predicted_peak_bytes)),
        measured_gb=mean(records, lambda r: _gb(r.memory.measured_peak_bytes)),
        memory_ratio=mean(records, _ratio),
        resident_gb=mean(records, lambda r: _gb(r.memory.resident_peak_bytes)),
        training_tflop=mean(records, _tflop),
        joules=mean(records, _joules),
    )


def mean(records: Sequence[RunRecord], value: Callable[[RunRecord], float | None]) -> float | None:
    """Mean of a figure that every run has; None where one lacks it."""
    values = [value(record) for record in records]
    present = [item for item in values if item is not None]
    return statistics.fmean(present) if values and len(present) == len(values) else None


def _gb(value: int | None) -> float | None:
    return None if value is None else value / GB


def _ratio(record: RunRecord) -> float | None:
    predicted, measured = record.memory.predicted_peak_bytes, record.memory.measured_peak_bytes
    return predicted / measured if predicted and measured else None


def _tflop(record: RunRecord) -> float | None:
    if record.flops is None or record.flops.total is None:
        return None
    return record.flops.total.sum() / TERA / record.runs_together


def _joules(record: RunRecord) -> float | None:
    if record.energy is None:
        return None
    found = record.energy.joules
    return sum(found.get(phase, 0.0) for phase in ("training", "evaluation")) / record.runs_together
