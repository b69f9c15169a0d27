"""Peak memory of a training step, predicted by running it on shapes alone, and followed on a step that really runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory import Category, MemoryLog, MemoryTracker
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack


def held(
    decoder: Decoder, bank: AdapterBank, optimizer: AdamW | None, others: Iterable[Tensor] = ()
) -> dict[Category, list[Tensor]]:
    """The tensors that outlive a step, by category; `others` are further copies of the masters."""
    derived = [t for value in bank.buffers.values() for t in _nested(value)]
    found: dict[Category, list[Tensor]] = {
        "base weights": decoder.weights.tensors(),
        "adapter": [bank.flat, *derived, *others],
        "gradients": [bank.gradient],
    }
    return found if optimizer is None else found | {"optimizer": [optimizer.first, optimizer.second]}


def _nested(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _nested(item)] if isinstance(value, (list, tuple)) else []


def training_memory(job: Job, packs: Sequence[Pack], *, probe: bool = False) -> MemoryLog:
    """The memory of one step, with the copy of the best masters that training keeps.

    With `probe` also the scratch of the CPU's matrix library, measured on this machine.
    """
    scope = Scope()
    decoder, bank = job.model(scope)
    optimizer, best = AdamW.create(bank), bank.flat.clone()
    kept = held(decoder, bank, optimizer, [best])
    tracker = MemoryTracker(scope, job.device, kept, job.config.vocab_size, symbolic=True, probe=probe)
    placed = [pack.to(decoder.device) for pack in packs]
    with tracker:
        run_step(decoder, bank, optimizer, placed, Ledger(scope, counter=SymbolicCounter(scope, job.device)))
    return tracker.log


def follow_step(
    decoder: Decoder, bank: AdapterBank, optimizer: AdamW, packs: Sequence[Pack], *, probe: bool = False
) -> MemoryLog:
    """The memory of a step that really runs, which updates nothing at rate 0."""
    kept = held(decoder, bank, optimizer, [bank.flat.clone()])
    tracker = MemoryTracker(decoder.scope, decoder.device.type, kept, decoder.config.vocab_size, probe=probe)
    with tracker:
        run_step(decoder, bank, optimizer, packs, Ledger(decoder.scope, on=False))
    return tracker.log
