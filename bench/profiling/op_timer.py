"""OpTimer: seconds of every operator by phase and owner, beside what the counter says it costs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.engine.accounting.scope import Scope


class OpTimer(DispatchMode):
    """Times each operator; on CUDA by events on its stream, read at the end, so that the host runs ahead as usual.

    Running under it costs some microseconds an operator, which is not in the operators' own times.
    """

    def __init__(self, scope: Scope, device: torch.device) -> None:
        super().__init__()
        self.scope = scope
        self.device = device
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._waiting: list[tuple[tuple[str, str], Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        key = self.scope.phase, func._opname
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = func(*args, **(kwargs or {}))
            end.record()
            self._waiting.append((key, begin, end))
            return result
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[key] += time.perf_counter() - start
        return result

    def read(self) -> dict[tuple[str, str], float]:
        """Seconds by (phase, operator)."""
        if self._waiting:
            torch.cuda.synchronize(self.device)
        for key, begin, end in self._waiting:
            self.seconds[key] += begin.elapsed_time(end) / 1000
        self._waiting.clear()
        return dict(self.seconds)
