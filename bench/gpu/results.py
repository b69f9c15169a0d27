"""Rows of a section as they are measured, a JSON line each, so that a run cut short goes on where it stopped."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
        """The section as an earlier call left it, or an empty one."""
        file = folder / f"{name}.jsonl"
        if fresh:
            file.unlink(missing_ok=True)
        lines = file.read_text().splitlines() if file.exists() else []
        return cls(name, file, seconds, {row["name"]: row for row in map(json.loads, lines)})

    def wants(self, name: str) -> bool:
        """Whether a row is still to be measured, and there is time for it."""
        if name in self.rows:
            return False
        if time.monotonic() - self.began < self.seconds:
            return True
        self.left.append(name)
        return False

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
