"""Run folders and the record of a run, run.json: its schema (docs/run-record.md), writing and finding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError

RECORD = "run.json"
FAILURE = "failure.json"
SWEEP = "sweep.json"
SCHEMA_VERSION = 1

Scores = dict[str, dict[str, float | None]]
"""Rule (corrected, published) -> metric -> value; null where a rule gives no number."""
Figures = dict[str, dict[str, int]]
"""Phase -> owner (base, adapter) -> FLOPs of all classes."""
FiguresByClass = dict[str, dict[str, dict[str, int]]]
"""Phase -> owner -> class (matrix, matrix_full, pointwise, reduction, bytes, calls) -> number."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Parameters(_Part):
    """Numbers of values: trained, in the adapter's file, read by inference with the unmerged adapter, and of the base
    model with what is trained."""

    trainable: int
    stored: int
    inference: int | None = None
    total: int


class TotalFlops(_Part):
    """Matrix FLOPs of every training step, predicted by summing products over layers: phase -> owner -> number."""

    kind: Literal["predicted"] = "predicted"
    steps: int
    """How many, those that a kill made necessary twice included."""
    matrix: Figures
    """Attention over the attended pairs."""
    matrix_full: Figures
    """Attention over the full square."""

    def sum(self) -> int:
        """All of `matrix`."""
        return sum(value for owners in self.matrix.values() for value in owners.values())


class Inference(_Part):
    """FLOPs of all classes of one run over one sequence, attention over the attended pairs: `forward`, logits of every
    token; `prefill`, of the last; `decode`, one token generated after the sequence with a key and value cache."""

    kind: Literal["predicted"] = "predicted"
    tokens: int
    base: dict[str, int]
    unmerged: dict[str, int]
    merged: dict[str, int] | None = None
    """The adapter folded into the weights."""
    not_mergeable: str | None = None
    """Why there is no `merged`."""

    def tflop_above_base(self, phase: str, *, merged: bool = False) -> float | None:
        """TFLOP of a phase less the base model's; None where the method cannot be merged."""
        figures = self.merged if merged else self.unmerged
        return None if figures is None else (figures[phase] - self.base[phase]) / 1e12


class Energy(_Part):
    """Joules that the hardware's own counter says were used, by phase; `training` has all between its first step and
    its end, the others are parts of it or of scoring."""

    source: str
    """rapl (Linux, processor) or nvml (NVIDIA, card)."""
    covers: str
    """Whose energy it is."""
    resolution_seconds: float
    """After how long the counter shows a new value."""
    joules: dict[str, float]


class Flops(_Part):
    """Of the sampled steps, summed: predicted from the shapes of their packs, and counted while they ran."""

    predicted: Figures
    counted: Figures
    by_class: dict[str, FiguresByClass]
    """The same two by class; `matrix_full` counts attention over the full square."""
    conventions: dict[str, str]
    """How attention and multiply-adds are counted."""
    steps: list[int]
    """Which steps were sampled, from 0, of those since the last resume."""
    equal_by_layer: bool
    """Whether both agree in every phase, owner and layer."""
    total: TotalFlops | None = None
    """Of all steps, not of the sampled ones alone."""


class Memory(_Part):
    """Bytes. Tensor peaks are predicted or measured; the resident and device peaks are the whole process's."""

    predicted_peak_bytes: int | None = None
    predicted_by_category: dict[str, int] | None = None
    """What is alive at the predicted peak."""
    measured_peak_bytes: int | None = None
    """Largest sum of live tensors in a training step, as the allocator handed them out."""
    validation_peak_bytes: int | None = None
    """The same between steps, while validation losses were computed."""
    reserved_peak_bytes: int | None = None
    """What the CUDA allocator held at most."""
    device_used_bytes: int | None = None
    """Used on the whole card, by all programs, at the end of a step at most."""
    resident_peak_bytes: int | None = None
    """Largest resident set while training."""
    evaluation_peak_bytes: int | None = None
    """The same kind of figure as the best of the measured ones above, while scoring."""


class PscpInputs(_Part):
    """What PSCP needs of this run; an input that was not obtained is absent."""

    score_percent: float | None = None
    trainable_parameters: int
    inference_tflop_above_base: float | None = None
    memory_gb: float | None = None
    memory_kind: str | None = None
    """Which figure of `memory` it is."""


class RunRecord(_Part):
    """All that is known of one finished run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    """Hash of settings, model and data: the same job has the same one."""
    finished: str
    """Date and time, UTC, ISO 8601."""
    command: str
    versions: dict[str, str]
    machine: dict[str, Any]
    git: dict[str, Any] | None = None
    model: dict[str, Any]
    """name, source, dtype, device."""
    method: dict[str, Any]
    """name, settings."""
    task: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    runs_together: int = 1
    """Runs that trained in one pass; `time` and `memory` are of all of them."""
    steps: int
    parameters: Parameters
    flops: Flops | None = None
    inference: Inference | None = None
    memory: Memory
    energy: Energy | None = None
    """Only where a counter could be read."""
    time: dict[str, float]
    """Seconds by phase; `step_median`, `step_p10`, `step_p90` are of one step."""
    loss: dict[str, float | int | None]
    """first, last (of training), best_validation, best_step."""
    scores: Scores | None = None
    baseline_scores: Scores | None = None
    pscp_inputs: PscpInputs
    events: list[str]
    stopped: str | None = None
    """Why training ended early, if it did."""
    data: dict[str, Any]
    """A source for each split, and `cut_sequences`."""

    @property
    def main_metric(self) -> str:
        """Name of the task's main figure."""
        return str(self.task["metric"])

    def score(self, rule: str = "corrected") -> float | None:
        """The main figure, a fraction of 1."""
        return None if self.scores is None else self.scores[rule][self.main_metric]

    def baseline(self, rule: str = "corrected") -> float | None:
        """The untuned model's main figure."""
        return None if self.baseline_scores is None else self.baseline_scores[rule][self.main_metric]


def write_record(folder: Path, record: RunRecord) -> None:
    """Write run.json, whole or not at all, and drop the note of an earlier failure."""
    write_json(folder / RECORD, record.model_dump(mode="json", exclude_none=True))
    (folder / FAILURE).unlink(missing_ok=True)


def read_record(path: Path) -> RunRecord:
    """A record from its file; UserError names the file and the first thing wrong."""
    values = read_object(path)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, this version reads {SCHEMA_VERSION}")
    try:
        return RunRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: field '{'.'.join(map(str, first['loc']))}': {first['msg']}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold an object, found {type(values).__name__}")
    return values


def finished_record(folder: Path, fingerprint: str) -> RunRecord | None:
    """The record of this very run where it is finished; UserError where the folder holds another run."""
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_record(path)
    if record.fingerprint != fingerprint:
        raise UserError(f"{folder} holds another run: {record.command}; give another --out or remove that folder")
    return record


def find_records(folder: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Every record below a folder, in the order of their paths."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of runs")
    for path in sorted(folder.rglob(RECORD)):
        yield path.parent, read_record(path)
