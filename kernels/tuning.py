"""Launch sizes of the GPU kernels: shipped for each architecture, and overridden by what was measured on this GPU.

Nothing is tuned while training: a kernel takes the measured tile of its shape class where `peftdyno tune` wrote one for
this GPU and this Triton, else the shipped one. Shipped tiles are the largest tried that keep their
values in registers, but for what the limits beside a kernel allow.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


SHIPPED: dict[str, dict[int, Tile]] = {
    "attention/64": {80: Tile(128, 64, 8, 2), 90: Tile(128, 64, 8, 3), 100: Tile(128, 64, 8, 2)},
    "attention/128": {80: Tile(128, 32, 8, 2), 90: Tile(128, 64, 8, 3), 100: Tile(128, 32, 8, 2)},
    "attention/256": {80: Tile(32, 32, 8, 2), 90: Tile(64, 32, 8, 2), 100: Tile(64, 16, 8, 2)},
    "attention/decode": {80: Tile(16, 64, 8, 2), 90: Tile(16, 64, 4, 3), 100: Tile(16, 64, 4, 3)},
    "attention_dq/64": {80: Tile(128, 32, 8, 2), 90: Tile(128, 64, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dq/128": {80: Tile(128, 32, 8, 2), 90: Tile(128, 32, 8, 3), 100: Tile(64, 32, 8, 2)},
    "attention_dq/256": {80: Tile(32, 32, 8, 1), 90: Tile(32, 32, 8, 1), 100: Tile(64, 32, 8, 1)},
    "attention_dk/64": {80: Tile(32, 64, 8, 2), 90: Tile(64, 128, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dk/128": {80: Tile(64, 64, 8, 2), 90: Tile(64, 64, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dk/256": {80: Tile(32, 32, 8, 1), 90: Tile(32, 32, 8, 1), 100: Tile(32, 32, 8, 1)},
    "lora_project": dict.fromkeys((80, 90, 100), Tile(32, 128, 8, 4)),
    "lora_outer": dict.fromkeys((80, 90, 100), Tile(64, 128, 4, 3)),
    "lora_add": dict.fromkeys((80, 90, 100), Tile(64, 128, 8, 2)),
    "lora_gemm": {80: Tile(64, 128, 8, 3), 90: Tile(128, 256, 8, 3), 100: Tile(128, 256, 8, 3)},
}
"""Kernel and shape class (width of a head) -> architecture -> tile."""

_trial: dict[str, Tile] = {}


@contextmanager
def trial(kernel: str, tile: Tile) -> Iterator[None]:
    """Within it, the kernel takes this tile."""
    _trial[kernel] = tile
    try:
        yield
    finally:
        del _trial[kernel]


def architecture(device: torch.device) -> int:
    """The newest shipped architecture that the device's is not older than; sm_90 in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in (80, 90, 100) if arch <= 10 * major + minor), default=80)


def tile(kernel: str, device: torch.device) -> Tile:
    """Launch sizes of a kernel on a device."""
    if kernel in _trial:
        return _trial[kernel]
    measured = _measured(cache_file(device)) if device.type == "cuda" else {}
    return measured.get(kernel) or SHIPPED[kernel][architecture(device)]


def cache_file(device: torch.device) -> Path:
    """Where tiles measured on this kind of GPU with this Triton are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftdyno" / "tiles"
    return folder / f"{_device_name(device)}-triton-{_triton_version()}.json"


@functools.cache
def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


@functools.cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@functools.cache
def _measured(file: Path) -> dict[str, Tile]:
    """Tiles of a cache file; raises ValueError where it cannot be read."""
    if not file.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        return {kernel: Tile(**entry["tile"]) for kernel, entry in content.items() if kernel in SHIPPED}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no tiles ({error}); delete it and run 'peftdyno tune' again") from error


def save(device: torch.device, results: dict[str, dict[str, Any]]) -> Path:
    """Add measured tiles to the cache file, atomically; each entry has `tile` and what was measured."""
    file = cache_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= {k: entry | {"tile": asdict(entry["tile"])} for k, entry in results.items()}
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(file)
    _measured.cache_clear()
    return file
