"""Peaks of memory as the system and the CUDA allocator measured them, from one moment on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs: forget the largest resident set so far (Linux, proc(5))."""


@dataclass
class PeakMemory:
    """Starts over where it is made; a figure that this system does not give is absent."""

    device: torch.device
    resident: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        _give_back()
        try:
            RESET.write_text(RESET_PEAK)
        except OSError:
            self.resident = False
        else:
            self.resident = True

    def figures(self) -> dict[str, int]:
        """Bytes by the names of `store.Memory`."""
        found = {}
        if self.device.type == "cuda":
            found["measured_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(self.device)
        if self.resident:
            found["resident_peak_bytes"] = _largest_resident_set()
        return found


def _give_back() -> None:
    """Return freed memory to the system, so that what ran before does not count."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
    if trim is not None:
        trim(0)


def _largest_resident_set() -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
