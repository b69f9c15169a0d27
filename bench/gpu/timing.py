"""Times on the device by events, from a cold L2 cache, and the ceilings they are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftdyno.kernels.triton.tune import milliseconds


def median_ms(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 20) -> float:
    """Median milliseconds of one call; the calls (the same on other data) take turns. By the clock without a GPU."""
    if device.type == "cuda":
        return milliseconds(calls, device, repeats)
    for call in calls:
        call()
    return statistics.median(_clock_ms(calls[i % len(calls)]) for i in range(2))


def _clock_ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: bytes a second read and written by a copy, FLOP/s of a bf16 product."""

    bytes_per_second: float
    flops_per_second: float

    def row(self) -> dict[str, float]:
        """As a result."""
        return asdict(self)


def ceilings(device: torch.device, *, tiny: bool) -> Ceilings:
    """Copy of random data and product of random matrices."""
    elements, size = (2**16, 64) if tiny else (2**31, 8192)
    return Ceilings(_copy_rate(elements, device), _product_rate(size, device))


def _copy_rate(elements: int, device: torch.device) -> float:
    source = torch.randint(-128, 127, (elements,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2e3 * elements / median_ms([lambda: target.copy_(source)], device)


def _product_rate(size: int, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2e3 * size**3 / median_ms([lambda: torch.mm(a, b)], device)
