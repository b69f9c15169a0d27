"""Peaks of memory, measured the same way on both sides: the resident set, and what PyTorch's allocator handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.peak_memory import PeakMemory
from peftdyno.kernels import cpu


def resident_peak(step: Callable[[], Any]) -> dict[str, float]:
    """`seconds` of a step and `peak_bytes`, the largest resident set of this process meanwhile.

    RuntimeError where the system does not let a process forget its earlier peak.
    """
    memory = PeakMemory(torch.device("cpu"))
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    figures = memory.figures()
    if "resident_peak_bytes" not in figures:
        raise RuntimeError("this system cannot reset the peak of the resident set (/proc/self/clear_refs)")
    return {"seconds": seconds, "units": 1.0, "peak_bytes": figures["resident_peak_bytes"]}


def traced_peak(step: Callable[[], Any]) -> int | None:
    """Bytes that PyTorch's CPU allocator held at most above those held before the step.

    None where the C++ extension, which records them, is not built.
    """
    if not (cpu.AVAILABLE and hasattr(torch.ops.peftdyno_cpu, "memory_start")):
        return None
    torch.ops.peftdyno_cpu.memory_start()
    try:
        step()
    finally:
        peak, _, _ = torch.ops.peftdyno_cpu.memory_stop()
    return int(peak)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
