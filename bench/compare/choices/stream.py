"""How fast memory is read and copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftdyno.bench.compare.choices.lines import Line, giga
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.turns import in_turns, timed


def stream(setting: Setting) -> list[Line]:
    """Reading, and copying with the bytes of both sides counted, of a buffer far larger than the caches."""
    source = torch.ones(setting.sizes.stream_bytes // 4)
    target = torch.empty_like(source)
    measures = {"read": lambda _: timed(reading(source)), "copy": lambda _: timed(copying(source, target))}
    samples = in_turns(measures, setting.repeats)
    cells = {name: giga(found) for name, found in samples.items()}
    return [Line(name="rate", what=f"a buffer of {source.nbytes / 1e6:.0f} MB", unit="GB/s", cells=cells)]


def reading(source: Tensor) -> Callable[[], float]:
    """Work that reads every element once; it gives the bytes."""

    def work() -> float:
        source.sum()
        return source.nbytes

    return work


def copying(source: Tensor, target: Tensor) -> Callable[[], float]:
    """Work that copies every element; it gives the bytes read and written."""

    def work() -> float:
        target.copy_(source)
        return source.nbytes + target.nbytes

    return work
