"""Ledger: what each phase of each step cost on the clock, and which packs it computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from peftdyno.engine.accounting.scope import Phase, Scope
from peftdyno.engine.pack import Pack


@dataclass
class Ledger:
    """Collects a record a step; a ledger that is off does nothing but set the scope's phase."""

    scope: Scope = field(default_factory=Scope)
    on: bool = True
    seconds: list[dict[str, float]] = field(default_factory=list)
    """Wall seconds by phase, an entry a finished step."""
    current: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Charge what runs inside to a phase."""
        start = time.perf_counter()
        with self.scope.within(phase=name):
            yield
        if self.on:
            self.current[name] = self.current.get(name, 0.0) + time.perf_counter() - start

    def see(self, pack: Pack) -> None:
        """A pack is about to be computed."""

    def end_step(self) -> None:
        """Close the step's record."""
        if self.on:
            self.seconds.append(self.current)
            self.current = {}
