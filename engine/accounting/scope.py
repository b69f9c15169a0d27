"""Scope: to whom the operation running now is charged. The program writes it, a ledger reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["data", "forward", "backward", "recompute", "optimizer", "prefill", "decode", "evaluation"]
Owner = Literal["base", "adapter"]


@dataclass
class Scope:
    """Phase, owner and layer (-1 before the first, num_layers after the last) of the operation running now."""

    phase: Phase = "forward"
    owner: Owner = "base"
    layer: int = -1

    @contextmanager
    def within(self, *, phase: Phase | None = None, owner: Owner | None = None) -> Iterator[None]:
        """Charge what runs inside to another phase or owner."""
        before = self.phase, self.owner
        self.phase, self.owner = phase or self.phase, owner or self.owner
        try:
            yield
        finally:
            self.phase, self.owner = before
