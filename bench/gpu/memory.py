"""Section `memory`: peak allocated bytes of a LoRA step at growing lengths, measured and predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from peftdyno.bench.gpu.peak import allocated
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import Setting, lean, model, pack_of, release, settings
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory_predict import held, step_prediction
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
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
    """A row a number of tokens: weights, the peak, and what was predicted of it; one without dropout, and one that
    computes pointwise results again."""
    lora, _, plain = settings(sizes)[:3]
    parts = [replace(sizes, length=sizes.length // share) for share in (4, 2, 1)]
    for part, setting in [*((part, lora) for part in parts), (sizes, plain), (sizes, lean(sizes))]:
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
    decoder, bank = model(
        sizes, setting.methods, device, bordered=setting.bordered, activations=setting.activations
    )  # fmt: skip
    optimizer, best, placed = AdamW.create(bank), bank.flat.clone(), pack.to(device)
    kept = held(decoder, bank, optimizer, [placed], [best])
    run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 0)
    before, peak, _ = allocated(
        lambda: run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 1), kept, device
    )
    return before, peak


def prediction(sizes: Sizes, setting: Setting, pack: Pack) -> Prediction:
    """Of the same step on a GPU, from shapes alone."""
    job = Job(
        config=sizes.config(), methods=setting.methods, device="cuda", bordered=setting.bordered,
        activations=setting.activations,
    )  # fmt: skip
    tally, log = step_prediction(job, [pack])
    again = [charge.matrix for (phase,), charge in tally.by("phase").items() if phase == "recompute"]
    return Prediction(log.peak_bytes, sum(again))
