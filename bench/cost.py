"""What a method will cost on a model, from the model's config alone: parameters, FLOPs and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peftdyno.engine.accounting.memory import MemoryLog
from peftdyno.engine.accounting.memory_predict import step_prediction
from peftdyno.engine.accounting.predict import Job, Untuned, forward_pass, generation
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.accounting.tally import Charge, nested
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Sequence
from peftdyno.engine.weights import empty_weights, parameter_count

CONVENTIONS = {
    "causal": "attention over the pairs that are attended; exact, and the default",
    "full": "attention over the full square of every sequence, as profilers of plain implementations count",
    "multiply_add": "2 FLOPs",
}
INFERENCE_PHASES = ("forward", "prefill", "decode")


def cost_report(job: Job, batch: int, length: int) -> dict[str, Any]:
    """All predicted figures of training on `batch` sequences of `length` tokens for each run and of inference on them.

    In training every token but the first of a sequence carries a loss. Inference is `forward`, logits of every token;
    `prefill`, of the last; and `decode`, one token generated after the sequence with a key and value cache. `merged`
    is the model with one run folded into its weights; absent where the method has no such form, and why.
    """
    method = job.methods[0]
    tally, memory = step_prediction(job, [job.plain_pack(batch, length)])
    base = _inference(replace(job, methods=(Untuned(),)), batch, length)
    report = {
        "method": method.name,
        "runs": len(job.methods),
        "batch": batch,
        "length": length,
        "conventions": CONVENTIONS,
        "parameters": {
            "base": parameter_count(job.config),
            "trainable": method.trainable_count(job.config),
            "stored": method.stored_count(job.config),
        },
        "training": {"flops": nested(tally.by("phase", "owner")), "memory": memory_report(memory)},
        "inference": {"base": base, "unmerged": _with_extra(_inference(job, batch, length), base)},
    }
    try:
        config = merged_config(job)
    except UserError as error:
        report["inference"]["not_mergeable"] = str(error)
    else:
        merged = replace(job, config=config, methods=(Untuned(),))
        same = config == job.config
        report["inference"]["merged"] = _with_extra(base if same else _inference(merged, batch, length), base)
    return report


def merged_config(job: Job) -> DecoderConfig:
    """Config of the model into which one run was folded; UserError where the method cannot be."""
    weights = empty_weights(job.config, job.dtype)
    bank = AdapterBank.create(job.config, job.methods[:1], [0], weights)
    with torch.no_grad(), SymbolicCounter(Scope()):
        return bank.method.merge(bank, 0, weights)


def _inference(job: Job, batch: int, length: int) -> dict[str, dict[str, int]]:
    """FLOPs by class of each phase of inference, of one run."""
    one = replace(job, methods=job.methods[:1])
    forward = forward_pass(one, one.plain_pack(batch, length))
    prompts = [Sequence(tokens=(i, *(0,) * (length - 1)), num_prompt=length, ordinal=i) for i in range(batch)]
    generated = generation(one, prompts, 2)
    sums = {phase: Charge() for phase in INFERENCE_PHASES}
    for tally, phases in ((forward, ("forward",)), (generated, ("prefill", "decode"))):
        for (phase,), charge in tally.by("phase").items():
            if phase in phases:
                sums[str(phase)] += charge
    return {phase: _classes(charge) for phase, charge in sums.items()}


def _classes(charge: Charge) -> dict[str, int]:
    names = ("matrix", "matrix_full", "pointwise", "reduction", "bytes")
    return {**{name: getattr(charge, name) for name in names}, "total": charge.flops}


def _with_extra(figures: dict[str, dict[str, int]], base: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The figures, each with what it is above the base model's as `above_base`."""
    return {
        phase: {**values, "above_base": values["total"] - base[phase]["total"]} for phase, values in figures.items()
    }


def memory_report(log: MemoryLog) -> dict[str, Any]:
    """The peak in bytes, when it happens, and what is alive then."""
    at = log.moments[log.peak_index]
    return {
        "predicted_peak_bytes": log.peak_bytes,
        "at": {"phase": at.phase, "layer": at.layer, "operator": at.operator},
        "by_category": log.by_category(log.peak_index),
    }


def methods_named(text: str) -> list[type[Method]]:
    """`lora,ia3` or `all` as methods; UserError with the closest names for one that does not exist."""
    from peftdyno.engine.adapters import METHODS, method_class

    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--method is empty; give a name, names with commas, or all")
    return [method_class(name) for name in names]
