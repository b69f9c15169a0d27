"""Section `memory`: peak allocated bytes of a LoRA step at growing lengths."""

from __future__ import annotations

from dataclasses import replace

import torch

from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import model, pack_of, release, settings
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.optim import AdamW


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a number of tokens; weights and the peak above them. There is nothing to read without a GPU."""
    setting = settings(sizes)[0]
    for share in (4, 2, 1):
        part = replace(sizes, length=sizes.length // share)
        name = f"{setting.name}, {part.tokens} tokens"
        if not section.wants(name):
            continue
        release(device)
        decoder, bank = model(part, setting.methods, device, bordered=setting.bordered)
        pack = pack_of(part, 1, decoder.config.vocab_size)
        optimizer = AdamW.create(bank)
        weights = torch.cuda.memory_allocated() if device.type == "cuda" else None
        for step in range(2):
            run_step(decoder, bank, optimizer, [pack], Ledger(Scope()), step)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        section.add(name, weights_and_state_bytes=weights, peak_bytes=peak)
        del decoder, bank, optimizer
    release(device)
