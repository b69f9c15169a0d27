"""Peaks of memory as the allocators and the system measured them, from one moment on."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peftdyno.engine.accounting.meter import CudaMeter, Meter, metered

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs: forget the largest resident set so far (Linux, proc(5))."""


@dataclass
class PeakMemory:
    """Starts over where it is made; a figure that this system does not give is absent.

    Where it is entered, a meter also follows live tensors; `kept` are those that there are already.
    """

    device: torch.device
    kept: Iterable[Tensor] = ()
    meter: Meter | None = None
    resident: bool = field(init=False)
    _open: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        _give_back()
        try:
            RESET.write_text(RESET_PEAK)
        except OSError:
            self.resident = False
        else:
            self.resident = True

    def __enter__(self) -> PeakMemory:
        self.meter = self._open.enter_context(metered(self.device, self.kept))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def figures(self) -> dict[str, int]:
        """Bytes by the names of `store.Memory`, of all that was marked so far."""
        found = {}
        if self.meter is not None:
            names = {"training": "measured_peak_bytes", "evaluation": "evaluation_peak_bytes"}
            found = {names[stage]: value for stage, value in self.meter.peaks.items()}
        if isinstance(self.meter, CudaMeter):
            free, everything = torch.cuda.mem_get_info(self.device)
            found["reserved_peak_bytes"] = self.meter.reserved
            found["device_used_bytes"] = everything - free
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
