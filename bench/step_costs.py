"""FLOPs and memory for a run's record: what a training step counted beside its prediction, what all steps and the peak
are predicted to be, and what inference costs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftdyno.bench.cost import merged_config
from peftdyno.bench.step_summary import StepSummary
from peftdyno.bench.store import Flops, Inference, TotalFlops, read_object
from peftdyno.engine.accounting import closed_form
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job, Untuned, forward_pass, generation
from peftdyno.engine.accounting.summary import flops_summary, predicted_memory, subject_job
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Sequence

FILE = "flops.json"
TOKENS = 512
"""Length of the sequence whose inference PSCP counts, at batch 1."""


@dataclass(frozen=True, kw_only=True)
class TrainingCosts:
    """What is predicted and counted of a training."""

    flops: Flops | None
    memory: dict[str, Any]
    """`predicted_peak_bytes` and `predicted_by_category`."""


def training_costs(ledger: Ledger, folder: Path, steps: StepSummary) -> TrainingCosts:
    """FLOPs of the sampled and of all steps, and the peak of the largest packs."""
    return TrainingCosts(
        flops=_training_flops(ledger, folder, steps),
        memory=predicted_memory(ledger, steps.largest),
    )


def _training_flops(ledger: Ledger, folder: Path, steps: StepSummary) -> Flops | None:
    """Those of the sampled steps are kept in the folder for when a resumed training has no step left to count; None
    where nothing was ever counted."""
    found, path = flops_summary(ledger), folder / FILE
    if found:
        sampled = {"by_class": found["flops_by_class"], "steps": list(ledger.sampled)}
        write_json(path, {**found["flops"], **sampled, "equal_by_layer": found["flops_equal_by_layer"]})
    if not path.exists():
        return None
    return Flops.model_validate({**read_object(path), "total": _all_steps(ledger, steps)})


def _all_steps(ledger: Ledger, steps: StepSummary) -> TotalFlops:
    """Matrix FLOPs of every step, by the closed form."""
    job = subject_job(ledger)
    causal: dict[str, dict[str, int]] = {}
    full: dict[str, dict[str, int]] = {}
    for (phase, owner, _), sums in closed_form.training(
        job.config, job.methods, steps.work, steps.steps, job.activations
    ).items():
        for table, value in zip((causal, full), sums, strict=True):
            owners = table.setdefault(phase, {})
            owners[owner] = owners.get(owner, 0) + value
    return TotalFlops(steps=steps.steps, matrix=causal, matrix_full=full)


def inference_costs(ledger: Ledger, method: Method) -> Inference:
    """FLOPs of inference over 1 x 512 tokens by one run: of the base model, with the adapter beside it, and with the
    adapter folded in."""
    job = replace(subject_job(ledger), methods=(method,))
    base = replace(job, methods=(Untuned(),))
    try:
        folded = replace(base, config=merged_config(job))
    except UserError as error:
        merged, reason = None, str(error)
    else:
        merged, reason = _phases(folded), None
    return Inference(tokens=TOKENS, base=_phases(base), unmerged=_phases(job), merged=merged, not_mergeable=reason)


@functools.lru_cache(maxsize=256)
def _phases(job: Job) -> dict[str, int]:
    """FLOPs of all classes, attention over the attended pairs: `forward` with all logits, `prefill` with the last
    one's, `decode` of one token after it."""
    prompt = Sequence(tokens=(0,) * TOKENS, num_prompt=TOKENS)
    found = {"forward": forward_pass(job, job.plain_pack(1, TOKENS)).total().flops}
    for (phase,), charge in generation(job, [prompt], 2).by("phase").items():
        if phase in ("prefill", "decode"):
            found[str(phase)] = charge.flops
    return found
