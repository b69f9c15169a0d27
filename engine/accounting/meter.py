"""Meter: the peak of live tensors as the device's allocator sees it, while a program runs, by stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from peftdyno.engine.accounting.memory_predict import held
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.kernels import memory

Stage = Literal["training", "evaluation"]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def kept_tensors(decoder: Decoder, bank: AdapterBank) -> list[Tensor]:
    """What lives before a training begins: weights, masters, gradients, and what a method derived."""
    return [tensor for tensors in held(decoder, bank, None).values() for tensor in tensors]


@dataclass
class Meter:
    """Peaks in bytes by stage; a stretch of the program belongs to the stage that it is marked with at its end."""

    peaks: dict[Stage, int] = field(default_factory=dict)

    def mark(self, stage: Stage | None) -> None:
        """The stretch since the last mark belonged to this stage; with None it is forgotten."""
        peak = self._take()
        if stage is not None:
            self.peaks[stage] = max(self.peaks.get(stage, 0), peak)

    def _take(self) -> int:
        """Peak since the last call."""
        raise NotImplementedError


@dataclass
class CpuMeter(Meter):
    """`base`, the bytes of what lives already, and what the allocator hands out on this thread from then on."""

    base: int = 0
    recorder: memory.AllocatorPeak = field(default_factory=memory.AllocatorPeak)

    def _take(self) -> int:
        return self.base + self.recorder.take_peak()


@dataclass
class CudaMeter(Meter):
    """What the allocator has handed out on a card, and what it has `reserved` of it."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    reserved: int = 0

    def _take(self) -> int:
        found: dict[str, Any] = torch.cuda.memory_stats(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.reserved = max(self.reserved, found.get("reserved_bytes.all.peak", 0))
        return int(found.get("allocated_bytes.all.peak", 0))


@contextmanager
def metered(device: torch.device, kept: Iterable[Tensor]) -> Iterator[Meter | None]:
    """A meter that runs meanwhile; `kept` are the tensors that live already.

    None on a CPU whose allocator cannot be recorded: the extension was not built, or a profiler records already.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield CudaMeter(device=device)
        return
    if not memory.available() or torch._C._autograd._profiler_enabled():
        yield None
        return
    with memory.AllocatorPeak() as recorder:
        yield CpuMeter(base=storage_bytes(kept), recorder=recorder)
