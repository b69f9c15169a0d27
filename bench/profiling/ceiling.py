"""Ceilings of this machine, measured: how fast it multiplies matrices and how fast it copies memory."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench import machine
from peftdyno.engine.atomic import write_json
from peftdyno.engine.model_cache import cache_folder

REPEATS = 5
SIZES = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices."""
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ceilings(device: torch.device, *, again: bool = False) -> dict[str, Any]:
    """`matmul_flops` by dtype and `copy_bytes`, each a second, from the cache or measured now.

    Copying counts the bytes read and those written. `measured` says when, `machine` where.
    """
    about = {"machine": machine.machine(), "torch": machine.versions()["torch"], "device": _name(device)}
    path = _path(about)
    if not again and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    result = {
        **about,
        "measured": time.strftime("%Y-%m-%d"),
        "matmul_flops": {name: _matmul(device, dtype) for name, dtype in DTYPES.items()},
        "copy_bytes": _copy(device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def _path(about: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "ceilings" / f"{digest}.json"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    n = SIZES[device.type]
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def _copy(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of the better half: what the machine can do when nothing else runs."""
    work()
    taken = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(sorted(taken)[: (REPEATS + 1) // 2])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
