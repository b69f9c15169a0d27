"""Bytes allocated at most during a call: by PyTorch's allocator on a GPU, without one by following every storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.memory import Category, MemoryTracker
from peftdyno.engine.accounting.scope import Scope


def allocated(
    call: Callable[[], Any], kept: Mapping[Category, Iterable[Tensor]], device: torch.device
) -> tuple[int, int, Any]:
    """Bytes before and at most during a call, and what it returns; `kept` are the tensors that exist before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated(), result
    tracker = MemoryTracker(Scope(), device.type, kept, 0)
    before = sum(block.nbytes for block in tracker.log.blocks)
    with tracker:
        result = call()
    return before, tracker.log.peak_bytes, result


def extra_bytes(call: Callable[[], Iterable[Tensor]], inputs: Iterable[Tensor], device: torch.device) -> int:
    """Bytes that a call allocates at most beside its inputs and the tensors it returns."""
    before, peak, result = allocated(call, {"inputs": inputs}, device)
    return peak - before - sum(tensor.numel() * tensor.element_size() for tensor in result)
