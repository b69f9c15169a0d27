"""From a finished job to the record of each of its runs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftdyno.bench import machine
from peftdyno.bench.evaluate import Evaluation
from peftdyno.bench.peak_memory import PeakMemory
from peftdyno.bench.step_costs import TrainingCosts
from peftdyno.bench.step_summary import StepSummary
from peftdyno.bench.store import Energy, Inference, Memory, Parameters, PscpInputs, RunRecord
from peftdyno.engine.accounting.energy import energy_counter, energy_metered
from peftdyno.engine.accounting.meter import kept_tensors
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.train import TrainState
from peftdyno.engine.weights import parameter_count

if TYPE_CHECKING:
    from peftdyno.bench.base_model import BaseModel
    from peftdyno.bench.job import Job

GB = 1e9
MEASURES = ("measured_peak_bytes", "resident_peak_bytes")
"""Figures that may stand for the memory of training, best first."""
EVALUATION_MEASURES = ("evaluation_peak_bytes", "resident_peak_bytes")
"""The same while scoring."""
SCORING = {"tuned": "evaluation", "untuned": "baseline"}
"""What the scoring of a model is called in a record."""


@dataclass
class Measured:
    """What training and scoring a job cost and gave."""

    state: TrainState
    steps: StepSummary
    work: Path
    cut: list[dict[str, int]]
    costs: TrainingCosts
    inference: Inference
    joules: dict[str, float] = field(default_factory=dict)
    """Of scoring, where they can be measured."""
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    baseline: Evaluation | None = None

    @contextmanager
    def watch(self, which: str, decoder: Decoder, bank: AdapterBank) -> Iterator[None]:
        """Clock, memory and energy of one evaluation."""
        start = time.perf_counter()
        counter = energy_counter(decoder.device)
        with PeakMemory(decoder.device, kept_tensors(decoder, bank)) as memory, energy_metered(counter) as energy:
            yield
            if memory.meter is not None:
                memory.meter.mark("evaluation")
            self.memory[which] = memory.figures()
            if energy is not None and not energy.lost:
                self.joules[which] = energy.total()
        self.seconds[which] = time.perf_counter() - start


def make_record(
    job: Job,
    base: BaseModel,
    bank: AdapterBank,
    run: int,
    fingerprint: str,
    measured: Measured,
    tuned: Evaluation | None,
) -> RunRecord:
    """The record of one run."""
    state = measured.state.runs[run]
    trained = bank.trainable_count(run)
    memory = _memory(measured)
    return RunRecord(
        fingerprint=fingerprint,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=machine.command(),
        versions=machine.versions(),
        machine=machine.machine(),
        git=machine.git(),
        model=base.describe(),
        method={"name": job.method.name, "settings": dataclasses.asdict(job.method)},
        task={"name": job.task.name, "metric": job.task.metric, "category": job.task.category},
        seed=job.settings.seeds[run],
        settings=job.settings.model_dump(mode="json"),
        runs_together=bank.num_runs,
        steps=job.steps(run),
        parameters=Parameters(
            trainable=trained,
            stored=job.method.stored_count(bank.config),
            inference=job.method.inference_count(bank.config),
            total=parameter_count(bank.config) + trained,
        ),
        flops=measured.costs.flops,
        inference=measured.inference,
        memory=memory,
        energy=_energy(measured),
        time=_time(base, measured),
        loss=_losses(measured, run),
        scores=None if tuned is None else tuned.scores,
        baseline_scores=None if measured.baseline is None else measured.baseline.scores,
        pscp_inputs=_pscp_inputs(job, measured, trained, memory, tuned),
        events=[event for event in measured.state.events if _concerns(event, run)],
        stopped=state.stopped or None,
        data=_data(job, run, measured, tuned),
    )


def _concerns(event: str, run: int) -> bool:
    """Whether an event is of this run or of all."""
    return not event.startswith("run ") or event.startswith(f"run {run} ")


def _memory(measured: Measured) -> Memory:
    while_scoring = measured.memory.get("tuned", {})
    peak = next((while_scoring[name] for name in EVALUATION_MEASURES if name in while_scoring), None)
    return Memory(**measured.costs.memory, **measured.steps.memory, evaluation_peak_bytes=peak)


def _energy(measured: Measured) -> Energy | None:
    """Training's, with scoring's where that was measured too."""
    found = measured.steps.energy
    if found is None:
        return None
    scoring = {SCORING[which]: value for which, value in measured.joules.items()}
    return found.model_copy(update={"joules": {**found.joules, **scoring}})


def _time(base: BaseModel, measured: Measured) -> dict[str, float]:
    found = {"load": base.load_seconds, "training": measured.steps.wall}
    found |= {SCORING[name]: value for name, value in measured.seconds.items()}
    return {"total": sum(found.values()), **found, **measured.steps.seconds()}


def _losses(measured: Measured, run: int) -> dict[str, float | int | None]:
    """First and last training loss, and where validation was best."""
    lines = (measured.work / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(lines[i])["loss"][run] for i in (0, -1)] if lines else [None, None]
    state = measured.state.runs[run]
    best = {"best_validation": state.best_loss, "best_step": state.best_step} if state.best_step >= 0 else {}
    return {"first": losses[0], "last": losses[1], **best}


def _pscp_inputs(job: Job, measured: Measured, trained: int, memory: Memory, tuned: Evaluation | None) -> PscpInputs:
    kind = next((name for name in MEASURES if getattr(memory, name) is not None), None)
    score = None if tuned is None else tuned.scores["corrected"][job.task.metric]
    return PscpInputs(
        score_percent=None if score is None else 100 * score,
        trainable_parameters=trained,
        inference_tflop_above_base=measured.inference.tflop_above_base("forward"),
        memory_gb=None if kind is None else getattr(memory, kind) / GB,
        memory_kind=kind,
    )


def _data(job: Job, run: int, measured: Measured, tuned: Evaluation | None) -> dict[str, Any]:
    rows = job.rows[run]
    used = {"train": len(rows.train), "validation": len(rows.validation), "test": len(rows.test)}
    cut = {**measured.cut[run], **({} if tuned is None else {"test": tuned.num_cut})}
    return {
        **{name: {**source.as_dict(), "rows_used": used[name]} for name, source in rows.sources.items()},
        "cut_sequences": cut,
    }
