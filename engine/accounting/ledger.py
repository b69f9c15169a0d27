"""Ledger: what each phase of each step cost on the clock, what sampled steps computed, and which packs there were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from peftdyno.engine.accounting.clock import Clock, clock_for
from peftdyno.engine.accounting.counting import Counter
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.scope import Owner, Phase, Scope
from peftdyno.engine.activations import Policy
from peftdyno.engine.pack import Pack

if TYPE_CHECKING:
    from peftdyno.engine.accounting.energy import EnergyMeter
    from peftdyno.engine.accounting.meter import Meter
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.method import Method
    from peftdyno.engine.config import DecoderConfig
    from peftdyno.engine.decoder import Decoder

WARM_UP_STEPS = 3
"""Steps at the start whose times are not part of the statistics."""

COUNTED_PHASES: tuple[Phase, ...] = ("forward", "backward", "recompute", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whose costs a ledger holds: enough to predict them again."""

    config: DecoderConfig
    methods: tuple[Method, ...]
    dtype: torch.dtype
    device: torch.device
    quant: str | None = None
    activations: Policy = "keep"


@dataclass
class Ledger:
    """Collects a record a step; a ledger that is off does nothing but set the scope.

    In sampled steps (the first, and every `every`-th where that is set) `counter` counts; those steps are not timed,
    since counting takes time itself.
    """

    scope: Scope = field(default_factory=Scope)
    on: bool = True
    clock: Clock = field(default_factory=Clock)
    counter: Counter | None = None
    every: int = 0
    subject: Subject | None = None
    num_steps: int = 0
    sampled: list[int] = field(default_factory=list)
    """Steps that were counted."""
    packs: list[tuple[PackShape, ...]] = field(default_factory=list)
    """Packs of every finished step."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of every finished step."""
    meter: Meter | None = None
    """Where there is one, it is told when a step or an evaluation between steps ends."""
    energy: EnergyMeter | None = None
    panel_bytes: int = 0
    """What the weights' panels hold while it collects, where they are kept."""
    _seen: list[PackShape] = field(default_factory=list)

    @classmethod
    def of(cls, decoder: Decoder, bank: AdapterBank, *, on: bool = True, every: int = 0) -> Ledger:
        """The ledger of a training of `bank` over `decoder`, which from now on charges the decoder's scope."""
        subject = Subject(
            config=decoder.config,
            methods=bank.methods,
            dtype=decoder.dtype,
            device=decoder.device,
            quant=decoder.weights.quantisation,
            activations=decoder.activations,
        )
        scope = decoder.scope
        counter = Counter(scope) if on else None
        return cls(scope, on, clock_for(decoder.device), counter, every, subject)

    @property
    def counting(self) -> bool:
        """Whether the running step is a sampled one."""
        if self.counter is None or not self.on:
            return False
        return self.num_steps == 0 or (self.every > 0 and self.num_steps % self.every == 0)

    @contextmanager
    def phase(self, name: Phase, *, owner: Owner = "base", layer: int | None = None) -> Iterator[None]:
        """Charge what runs inside to a phase, and to the owner where an operator does not know its own."""
        with self.scope.within(phase=name, owner=owner, layer=layer):
            if not self.on:
                yield
            elif self.counting and name in COUNTED_PHASES:
                yield from self._counted()
            else:
                yield from self._timed(name)

    def _timed(self, name: Phase) -> Iterator[None]:
        if self.energy is not None:
            self.energy.start()
        self.clock.start()
        yield
        self.clock.stop(name)
        if self.energy is not None:
            self.energy.stop(name)
        if name == "evaluation":
            self._mark("evaluation")

    def _mark(self, stage: Literal["training", "evaluation"] | None) -> None:
        if self.meter is not None:
            self.meter.mark(stage)

    def _counted(self) -> Iterator[None]:
        assert self.counter is not None
        if not self.scope.recording:
            self.scope.record(True)
        with self.counter:
            yield

    def see(self, pack: Pack) -> None:
        """A pack is about to be computed."""
        if self.on:
            self._seen.append(PackShape.of(pack))

    def end_step(self) -> None:
        """Close the step's record."""
        if not self.on:
            return
        counted = self.counting
        if counted:
            self.sampled.append(self.num_steps)
            self.scope.record(False)
        self.clock.end_step(keep=not counted)
        self.packs.append(tuple(self._seen))
        self.tokens.append(sum(shape.num_tokens for shape in self._seen))
        self._seen = []
        self.num_steps += 1
        self._mark("training")

    def abandon_step(self) -> None:
        """Forget what the unfinished step cost, for it will be repeated."""
        if self.on:
            self.scope.record(False)
            self.clock.end_step(keep=False)
            self._seen = []
            self._mark(None)
