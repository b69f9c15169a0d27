"""What PyTorch's CPU allocator hands out on this thread, recorded by the compiled extension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peftdyno.kernels import cpu


def available() -> bool:
    """Whether the compiled extension, which records, was built."""
    return cpu.AVAILABLE and hasattr(torch.ops.peftdyno_cpu, "memory_start")


@dataclass
class AllocatorPeak:
    """Records while it is entered: bytes held at most (since `take_peak`, where that was called) and at the end, above
    those held at the start, and the number of allocations. What was allocated before and is freed meanwhile is not
    subtracted.

    RuntimeError where the extension was not built, or a profiler or another recorder runs on this thread.
    """

    peak_bytes: int = 0
    live_bytes: int = 0
    allocations: int = 0

    def __enter__(self) -> AllocatorPeak:
        if not available():
            raise RuntimeError("the CPU allocator can be recorded only by the compiled extension, which was not built")
        torch.ops.peftdyno_cpu.memory_start()
        return self

    def take_peak(self) -> int:
        """Bytes held at most since the start or the last call, above those held at the start."""
        peak: int = torch.ops.peftdyno_cpu.memory_now()[0]
        torch.ops.peftdyno_cpu.memory_reset_peak()
        return peak

    def __exit__(self, *_: Any) -> None:
        self.peak_bytes, self.live_bytes, self.allocations = torch.ops.peftdyno_cpu.memory_stop()
