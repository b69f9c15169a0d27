"""Rows of a section as they are measured, a JSON line each, so that a run cut short goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftdyno.engine.errors import first_line


class DeviceLost(RuntimeError):
    """The GPU refuses further work of this process."""


FATAL = (
    "illegal memory access", "misaligned address", "illegal instruction", "device-side assert", "launch failure",
    "launch timed out", "invalid program counter", "address space", "hardware stack error", "tensor memory not",
    "uncorrectable", "context is destroyed",
)  # fmt: skip
"""What the driver says of an error after which every call fails (cudaError_t 214, 220, 700, 702, 709 to 721), however
PyTorch ("CUDA error: ...") or Triton's launcher ("Triton Error [CUDA]: ...") begins the message."""


def lost(error: BaseException) -> bool:
    """Whether the device refuses further work after an error: by its words, or since it no longer answers at all. Too
    little memory and too large a launch leave it usable."""
    text = str(error)
    if "CUDA" in text and any(words in text for words in FATAL):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass
class Section:
    """Rows of one section by name; `seconds` is how long it may take before it leaves the rest to the next call."""

    name: str
    file: Path
    seconds: float
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, name: str, folder: Path, seconds: float, *, fresh: bool) -> Section:
        """The section as an earlier call left it, without rows that are worth another try, or an empty one."""
        file = folder / f"{name}.jsonl"
        if fresh:
            file.unlink(missing_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        rows = {row["name"]: row for row in map(json.loads, lines)}
        return cls(name, file, seconds, {n: row for n, row in rows.items() if not row.get("again")})

    def wants(self, name: str, takes: float = 0.0) -> bool:
        """Whether a row is still to be measured, and there is time for it; `takes` seconds, where that is long."""
        if name in self.rows:
            return False
        if time.monotonic() - self.began + takes < self.seconds:
            return True
        if name not in self.left:
            self.left.append(name)
        return False

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Keep what a row raises in its place and go on. Raises DeviceLost where the device itself failed: no later
        row could run in this process."""
        try:
            yield
        except Exception as error:
            reason, dead = f"{type(error).__name__}: {first_line(error)}", lost(error)
            self.add(name, ok=False, failed=reason, again=not dead)
            if dead:
                raise DeviceLost(f"{name}: {reason}") from error
            error.__traceback__ = None  # its frames hold the row's tensors until garbage is collected

    def add(self, name: str, **values: Any) -> None:
        """Keep a row."""
        row = {"name": name, **values}
        self.rows[name] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.name:<8}{name:<56}{brief(values)}", flush=True)


def brief(values: dict[str, Any]) -> str:
    """A row's values on one line."""
    return "  ".join(f"{key} {_short(value)}" for key, value in values.items() if value is not None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
