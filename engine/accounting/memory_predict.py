"""Peak memory of a training step, predicted by running it on shapes alone, and followed on a step that really runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory import Category, MemoryLog, MemoryTracker
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.accounting.tally import Tally
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack


def held(
    decoder: Decoder,
    bank: AdapterBank,
    optimizer: AdamW | None,
    packs: Sequence[Pack] = (),
    others: Iterable[Tensor] = (),
) -> dict[Category, list[Tensor]]:
    """The tensors that outlive a step, by category; `others` are further copies of the masters."""
    derived = [t for value in bank.buffers.values() for t in _nested(value)]
    found: dict[Category, list[Tensor]] = {
        "base weights": decoder.weights.tensors(),
        "adapter": [bank.flat, *derived, *others],
        "gradients": [bank.gradient],
        "inputs": [tensor for pack in packs for tensor in pack_tensors(pack)],
    }
    return found if optimizer is None else found | {"optimizer": [optimizer.first, optimizer.second]}


def pack_tensors(pack: Pack) -> list[Tensor]:
    """The arrays of a pack that lie where the model runs."""
    labels, runs = pack.labels, (pack.runs, pack.labels.row_runs)
    found = [pack.tokens, pack.positions, pack.virtual_rows, pack.virtual_index]
    found += [labels.index, labels.target, labels.weight, labels.rows, labels.place]
    return found + [r.streams for r in runs if r.streams is not None]


def _nested(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _nested(item)] if isinstance(value, (list, tuple)) else []


def training_memory(job: Job, packs: Sequence[Pack], *, probe: bool = False) -> MemoryLog:
    """The memory of one step, with the copy of the best masters that training keeps.

    With `probe` also the scratch of the CPU's matrix library, measured on this machine.
    """
    return step_prediction(job, packs, probe=probe)[1]


def step_prediction(job: Job, packs: Sequence[Pack], *, probe: bool = False) -> tuple[Tally, MemoryLog]:
    """Costs and memory of one training step, from one symbolic run."""
    scope = Scope()
    tracker = _tracker(job, scope, probe)
    with _followed(tracker, job):
        decoder, bank = job.model(scope)
        optimizer, best = AdamW.create(bank), bank.flat.clone()
        placed = [pack.to(decoder.device) for pack in packs]
    tracker.begin(held(decoder, bank, optimizer, placed, [best]))
    counter = SymbolicCounter(scope, job.device)
    with tracker:
        run_step(decoder, bank, optimizer, placed, Ledger(scope, counter=counter))
    return counter.tally, tracker.log


def validation_memory(job: Job, pack: Pack, *, probe: bool = False) -> MemoryLog:
    """The memory of the losses of a pack between two training steps, without gradients."""
    scope = Scope()
    tracker = _tracker(job, scope, probe)
    with _followed(tracker, job):
        decoder, bank = job.model(scope)
        optimizer, best = AdamW.create(bank), bank.flat.clone()
        placed = pack.to(decoder.device)
    tracker.begin(held(decoder, bank, optimizer, [placed], [best]))
    with tracker, SymbolicCounter(scope, job.device), scope.within(phase="evaluation"):
        bank.begin(0, training=False)
        with torch.no_grad():
            decoder.losses(placed, bank)
    return tracker.log


def _tracker(job: Job, scope: Scope, probe: bool) -> MemoryTracker:
    return MemoryTracker(scope, job.device, {}, job.config.vocab_size, symbolic=True, probe=probe)


def _followed(tracker: MemoryTracker, job: Job) -> AbstractContextManager[Any]:
    """On CUDA the making of a model is followed too, for it decides how the allocator's blocks lie."""
    return tracker if job.device == "cuda" else nullcontext()


def follow_step(
    decoder: Decoder, bank: AdapterBank, optimizer: AdamW, packs: Sequence[Pack], *, probe: bool = False
) -> MemoryLog:
    """The memory of a step that really runs, which updates nothing at rate 0."""
    kept = held(decoder, bank, optimizer, packs, [bank.flat.clone()])
    tracker = MemoryTracker(decoder.scope, decoder.device.type, kept, decoder.config.vocab_size, probe=probe)
    with tracker:
        run_step(decoder, bank, optimizer, packs, Ledger(decoder.scope, on=False))
    return tracker.log
