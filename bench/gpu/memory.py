"""Section `memory`: peak allocated bytes of a LoRA step at growing lengths, measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from peftdyno.bench.gpu.peak import allocated
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import Setting, model, pack_of, release, settings
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory import MemoryTracker
from peftdyno.engine.accounting.memory_predict import held
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack


@dataclass(frozen=True)
class Prediction:
    """Of a step: its peak, and the FLOPs of products that its backward pass computes again."""

    peak_bytes: int
    recomputed_flops: int


def peak_name(sizes: Sizes, setting: Setting) -> str:
    """The row of a setting."""
    return f"{setting.name}, {sizes.tokens} tokens"


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a number of tokens: weights, the peak, and what was predicted of it; and one without dropout."""
    lora, _, plain = settings(sizes)[:3]
    parts = [replace(sizes, length=sizes.length // share) for share in (4, 2, 1)]
    for part, setting in [*((part, lora) for part in parts), (sizes, plain)]:
        name = peak_name(part, setting)
        if section.wants(name, takes=60.0):
            release(device)
            with section.attempt(name):
                section.add(name, **_row(part, setting, device))
    release(device)


def _row(sizes: Sizes, setting: Setting, device: torch.device) -> dict[str, Any]:
    pack = pack_of(sizes, 1, sizes.config().vocab_size)
    predicted = prediction(sizes, setting, pack)
    weights, peak = measured_peak(sizes, setting, pack, device)
    return {
        "weights_and_state_bytes": weights,
        "peak_bytes": peak,
        "predicted_bytes": predicted.peak_bytes,
        "predicted_over_peak": predicted.peak_bytes / peak,
        "recomputed_flops": predicted.recomputed_flops,
    }


def measured_peak(sizes: Sizes, setting: Setting, pack: Pack, device: torch.device) -> tuple[int, int]:
    """Bytes allocated before and at most during the second of two steps, which makes no table anew."""
    decoder, bank = model(sizes, setting.methods, device, bordered=setting.bordered)
    optimizer, placed = AdamW.create(bank), pack.to(device)
    kept = held(decoder, bank, optimizer, [placed])
    run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 0)
    before, peak, _ = allocated(
        lambda: run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 1), kept, device
    )
    return before, peak


def prediction(sizes: Sizes, setting: Setting, pack: Pack) -> Prediction:
    """Of the same step on a GPU, from shapes alone."""
    scope = Scope()
    job = Job(config=sizes.config(), methods=setting.methods, device="cuda", bordered=setting.bordered)
    decoder, bank = job.model(scope)
    optimizer, placed = AdamW.create(bank), pack.to(decoder.device)
    kept = held(decoder, bank, optimizer, [placed])
    tracker = MemoryTracker(scope, "cuda", kept, decoder.config.vocab_size, symbolic=True)
    counter = SymbolicCounter(scope, "cuda")
    with tracker:
        run_step(decoder, bank, optimizer, [placed], Ledger(scope, counter=counter))
    again = [charge.matrix for (phase,), charge in counter.tally.by("phase").items() if phase == "recompute"]
    return Prediction(tracker.log.peak_bytes, sum(again))
