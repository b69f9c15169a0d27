"""FLOPs for a run's record: what a training step counted beside its prediction, and what inference costs above the
base model."""

from __future__ import annotations

from pathlib import Path

from peftdyno.bench.store import Flops, read_object
from peftdyno.engine.accounting.ledger import Ledger, Subject
from peftdyno.engine.accounting.predict import Job, Untuned, forward_pass
from peftdyno.engine.accounting.summary import summary
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.atomic import write_json

FILE = "flops.json"
TOKENS = 512
"""Length of the sequence whose inference PSCP counts, at batch 1."""
TERA = 1e12


def training_flops(ledger: Ledger, folder: Path) -> Flops | None:
    """Counted and predicted FLOPs of the sampled steps, kept in the folder for when a resumed training has no step
    left to count; None where nothing was ever counted."""
    found = summary(ledger)
    path = folder / FILE
    if "flops" in found:
        write_json(
            path,
            {
                **found["flops"],
                "by_class": found["flops_by_class"],
                "steps": found["steps"]["counted"],
                "equal_by_layer": found["flops_equal_by_layer"],
            },
        )
    return Flops.model_validate(read_object(path)) if path.exists() else None


def inference_tflop_above_base(subject: Subject, method: Method) -> float:
    """Predicted TFLOP of one unmerged forward pass over 1 x 512 tokens, all logits computed, less the base model's.

    FLOPs of all classes, attention over the attended pairs.
    """
    flops = []
    for one in (method, Untuned()):
        job = Job(
            config=subject.config,
            methods=(one,),
            dtype=subject.dtype,
            device=subject.device.type,
            quant=subject.quant,
        )
        flops.append(forward_pass(job, job.plain_pack(1, TOKENS)).total().flops)
    return (flops[0] - flops[1]) / TERA
