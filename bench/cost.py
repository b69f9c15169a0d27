"""What a method will cost on a model, from the model's config alone: parameters, FLOPs and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from peftdyno.bench.memory_limit import Limit, Way
from peftdyno.engine.accounting.memory import MemoryLog
from peftdyno.engine.accounting.memory_predict import pack_tensors, step_prediction
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.predict import Job, Untuned, forward_pass, generation
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.accounting.tally import Charge, nested
from peftdyno.engine.accounting.workspace import not_asked
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Pack, Sequence
from peftdyno.engine.weights import empty_weights, parameter_count

CONVENTIONS = {
    "causal": "attention over the pairs that are attended; exact, and the default",
    "full": "attention over the full square of every sequence, as profilers of plain implementations count",
    "multiply_add": "2 FLOPs",
}
INFERENCE_PHASES = ("forward", "prefill", "decode")


def cost_report(job: Job, batch: int, length: int, limits: Limits | None = None) -> dict[str, Any]:
    """All predicted figures of training on `batch` sequences of `length` tokens for each run and of inference on them.

    `within_limit` is the fastest way to train that fits `limits`, or that none does; the other figures of training are
    of the batch as a whole under the job's own policy.

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
        "activations": job.activations,
        "conventions": CONVENTIONS,
        "parameters": {
            "base": parameter_count(job.config),
            "trainable": method.trainable_count(job.config),
            "stored": method.stored_count(job.config),
            "inference": method.inference_count(job.config),
        },
        "training": {"flops": nested(tally.by("phase", "owner")), "memory": memory_report(memory, job.device)},
        "inference": {"base": base, "unmerged": _with_extra(_inference(job, batch, length), base)},
    }
    if limits is not None:
        report["training"]["within_limit"] = _within(limits, job, batch, length)
    try:
        config = merged_config(job)
    except UserError as error:
        report["inference"]["not_mergeable"] = str(error)
    else:
        merged = replace(job, config=config, methods=(Untuned(),))
        same = config == job.config
        report["inference"]["merged"] = _with_extra(base if same else _inference(merged, batch, length), base)
    return report


@dataclass(frozen=True)
class Limits:
    """Bytes that training may take, and the policies that may be chosen."""

    limit: int
    policies: tuple[Policy, ...] = POLICIES


@dataclass(frozen=True)
class _EqualPacks:
    """Packs of sequences of one length, for `runs` runs of the job's method."""

    job: Job
    batch: int
    length: int
    runs: int

    def largest(self, way: Way) -> tuple[PackShape, ...]:
        """All packs of a way are alike."""
        return (PackShape.of(self._pack(way)),)

    def waiting(self, way: Way) -> int:
        """Bytes of the arrays of the other packs of a step."""
        others = -(-self.batch // way.micro_batch) - 1
        return others * sum(tensor.nbytes for tensor in pack_tensors(self._pack(way)))

    def work(self, way: Way) -> tuple[int, int]:
        """Tokens and packs of one step of all runs."""
        packs = -(-self.runs // way.together) * -(-self.batch // way.micro_batch)
        root = self.job.root
        learned = root.length * way.together * packs if root is not None and root.kind == "tokens" else 0
        return self.runs * self.batch * self.length + learned, packs

    def _pack(self, way: Way) -> Pack:
        return replace(self.job, methods=self.job.methods * way.together).plain_pack(way.micro_batch, self.length)


def _within(limits: Limits, job: Job, batch: int, length: int) -> dict[str, Any]:
    """What would be chosen; where nothing fits, what the user would be told."""
    runs, one = len(job.methods), replace(job, methods=job.methods[:1])
    sizes = sorted({-(-runs // groups) for groups in range(1, runs + 1)})
    packs = _EqualPacks(one, batch, length, runs)
    try:
        chosen = Limit(one, packs, limits.limit, batch, limits.policies, sizes).choose()
    except UserError as error:
        return {"limit_bytes": limits.limit, "says": str(error)}
    way = {"activations": chosen.way.activations, "micro_batch": chosen.way.micro_batch}
    way |= {"runs_together": chosen.way.together, "predicted_peak_bytes": chosen.peak_bytes}
    return {"limit_bytes": limits.limit, **way, "says": str(chosen)}


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


def memory_report(log: MemoryLog, device: str) -> dict[str, Any]:
    """The peak in bytes, when it happens, what is alive then, and why it is not exact where it is not; on CUDA also
    what PyTorch's allocator takes from the card."""
    at, inexact = log.moments[log.peak_index], not_asked(device)
    return {
        "predicted_peak_bytes": log.peak_bytes,
        "at": {"phase": at.phase, "layer": at.layer, "operator": at.operator},
        "by_category": log.by_category(log.peak_index),
        **({"predicted_reserved_bytes": log.reserved_bytes} if device == "cuda" else {}),
        **({} if inexact is None else {"not_exact": inexact}),
    }


def methods_named(text: str) -> list[type[Method]]:
    """`lora,ia3` or `all` as methods; UserError with the closest names for one that does not exist."""
    from peftdyno.engine.adapters import METHODS, method_class

    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--method is empty; give a name, names with commas, or all")
    return [method_class(name) for name in names]
