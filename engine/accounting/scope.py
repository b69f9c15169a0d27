"""Scope: to whom the operation running now is charged. The program writes it, a ledger reads it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

Phase = Literal["data", "forward", "backward", "recompute", "optimizer", "prefill", "decode", "evaluation"]
Owner = Literal["base", "adapter"]
PHASES: tuple[Phase, ...] = get_args(Phase)
OWNERS: tuple[Owner, ...] = get_args(Owner)


@dataclass
class Scope:
    """Phase, owner and layer (-1 before the first, num_layers after the last) of the operation running now.

    While `recording`, it also notes which stretches of the autograd graph each owner builds, so that a backward
    operation is charged to the owner of its forward one. What is computed again during a backward pass is charged as
    in the forward pass, to the owner that runs.
    """

    phase: Phase = "forward"
    owner: Owner = "base"
    layer: int = -1
    recording: bool = False
    _starts: list[int] = field(default_factory=list)
    _owners: list[Owner] = field(default_factory=list)

    @contextmanager
    def within(
        self, *, phase: Phase | None = None, owner: Owner | None = None, layer: int | None = None
    ) -> Iterator[None]:
        """Charge what runs inside to another phase or owner, from `layer` on where it is given."""
        before = self.phase, self.owner
        self._enter(phase or self.phase, owner or self.owner)
        self.layer = self.layer if layer is None else layer
        try:
            yield
        finally:
            self._enter(*before)

    def _enter(self, phase: Phase, owner: Owner) -> None:
        changed = owner != self.owner
        self.phase, self.owner = phase, owner
        if changed and self.recording and self.phase != "recompute":
            self._note()

    def _note(self) -> None:
        """From here on the graph is the present owner's."""
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._owners.append(self.owner)

    def record(self, on: bool) -> None:
        """Start or stop noting owners of the graph; stopping forgets them."""
        self.recording = on
        self._starts.clear()
        self._owners.clear()
        if on:
            self._note()

    def running_owner(self) -> Owner:
        """Owner of the operation running now; inside a backward pass, that of the forward operation."""
        node = torch._C._current_autograd_node()
        if node is None or self.phase == "recompute":
            return self.owner
        if node.name().endswith("AccumulateGrad"):
            return "adapter"  # nothing else is trained
        place = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._owners[place] if place >= 0 else "base"
