"""Clock: seconds by phase and step, from the monotonic clock on the CPU and from event pairs on CUDA."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from peftdyno.engine.accounting.scope import Phase

EVENT_PAIRS = 64
"""CUDA event pairs made in advance; a step that needs more makes them then."""


@dataclass
class Clock:
    """Wall seconds on the CPU."""

    steps: list[dict[Phase, float]] = field(default_factory=list)
    """Seconds by phase, an entry a timed step."""
    _current: dict[Phase, float] = field(default_factory=dict)
    _began: float = 0.0

    def start(self) -> None:
        """A phase begins; phases do not nest."""
        self._began = time.perf_counter()

    def stop(self, phase: Phase) -> None:
        """The phase begun last ends."""
        self._current[phase] = self._current.get(phase, 0.0) + time.perf_counter() - self._began

    def end_step(self, *, keep: bool) -> None:
        """The step is over; `keep` its seconds, or forget them."""
        if keep:
            self.steps.append(self._current)
        self._current = {}

    def read(self) -> list[dict[Phase, float]]:
        """Seconds by phase of every kept step."""
        return self.steps


class CudaClock(Clock):
    """Seconds on the device between two events of its stream, read when the results are asked for: the loop never
    waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self._free = [self._pair() for _ in range(EVENT_PAIRS)]
        self._open: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self._waiting: list[list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]]] = []
        self._begin: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @staticmethod
    def _pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._begin = self._free.pop() if self._free else self._pair()
        self._begin[0].record()

    def stop(self, phase: Phase) -> None:
        assert self._begin is not None, phase
        self._begin[1].record()
        self._open.append((phase, *self._begin))

    def end_step(self, *, keep: bool) -> None:
        if keep:
            self._waiting.append(self._open)
        self._open = []
        while self._waiting and all(end.query() for _, _, end in self._waiting[0]):
            self._collect()

    def _collect(self) -> None:
        seconds: dict[Phase, float] = {}
        for phase, begin, end in self._waiting.pop(0):
            seconds[phase] = seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1000
            self._free.append((begin, end))
        self.steps.append(seconds)

    def read(self) -> list[dict[Phase, float]]:
        torch.cuda.synchronize()
        while self._waiting:
            self._collect()
        return self.steps


def clock_for(device: torch.device | str) -> Clock:
    """The clock of a device."""
    return CudaClock() if torch.device(device).type == "cuda" else Clock()
