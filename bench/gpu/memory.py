"""Section `memory`: peak allocated bytes of a LoRA step at growing lengths, measured and predicted."""

from __future__ import annotations

from dataclasses import replace

import torch

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


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a number of tokens: weights, the peak, and what was predicted of it. Without a GPU only the prediction."""
    setting = settings(sizes)[0]
    for share in (4, 2, 1):
        part = replace(sizes, length=sizes.length // share)
        name = f"{setting.name}, {part.tokens} tokens"
        if not section.wants(name):
            continue
        release(device)
        pack = pack_of(part, 1, part.config().vocab_size)
        predicted = predicted_peak(part, setting, pack)
        weights, peak = measured_peak(part, setting, pack, device) if device.type == "cuda" else (None, None)
        section.add(
            name, weights_and_state_bytes=weights, peak_bytes=peak, predicted_bytes=predicted,
            predicted_over_peak=None if peak is None else predicted / peak,
        )  # fmt: skip
    release(device)


def measured_peak(sizes: Sizes, setting: Setting, pack: Pack, device: torch.device) -> tuple[int, int]:
    """Bytes allocated before and at most during the second of two steps, which makes no table anew."""
    decoder, bank = model(sizes, setting.methods, device, bordered=setting.bordered)
    optimizer, placed = AdamW.create(bank), pack.to(device)
    run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 0)
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False), 1)
    return weights, torch.cuda.max_memory_allocated()


def predicted_peak(sizes: Sizes, setting: Setting, pack: Pack) -> int:
    """Peak of the same step on a GPU, from shapes alone."""
    scope = Scope()
    job = Job(config=sizes.config(), methods=setting.methods, device="cuda", bordered=setting.bordered)
    decoder, bank = job.model(scope)
    optimizer, placed = AdamW.create(bank), pack.to(decoder.device)
    kept = held(decoder, bank, optimizer, [placed])
    tracker = MemoryTracker(scope, "cuda", kept, decoder.config.vocab_size, symbolic=True)
    with tracker:
        run_step(decoder, bank, optimizer, [placed], Ledger(scope, counter=SymbolicCounter(scope, "cuda")))
    return tracker.log.peak_bytes
