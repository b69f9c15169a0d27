"""StepLog: what each step took on the clock, in memory and in energy, on disk, so that a resumed run still knows all
of it."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from peftdyno.bench.peak_memory import PeakMemory
from peftdyno.engine.accounting.energy import EnergyMeter, energy_counter, energy_metered
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.meter import kept_tensors
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.work import Work, total_work
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder

FILE = "steps.jsonl"
BETWEEN = "evaluation"
"""The ledger's phase that lies between steps: validation. In a record, `evaluation` is the scoring of test rows."""


@dataclass
class StepLog:
    """Appends a line a step to steps.jsonl; a step repeated after a kill has two lines, as both were spent.

    `wall` is all the time since the line before, validation and checkpoints included; `phases` are the ledger's
    seconds of steps it has timed since, which on a device may be of earlier ones; `work` is what the step's FLOPs
    follow from; `largest` has the packs that were larger than all before.
    """

    folder: Path
    ledger: Ledger
    decoder: Decoder
    bank: AdapterBank
    memory: PeakMemory = field(init=False)
    file: BinaryIO = field(init=False)
    began: float = field(init=False)
    timed: int = 0
    packed: int = 0
    _joules: dict[str, float] = field(default_factory=dict)
    _largest: list[tuple[int, ...]] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> StepLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self._open.enter_context((self.folder / FILE).open("ab"))
        device = self.decoder.device
        self.memory = PeakMemory(device, kept_tensors(self.decoder, self.bank))
        self.ledger.meter = self._open.enter_context(self.memory).meter
        self.ledger.energy = self._open.enter_context(energy_metered(energy_counter(device)))
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.ledger.clock.read()
            self._write({"tokens": 0})
        self.ledger.meter = self.ledger.energy = None
        self._open.close()

    def append(self, step: int, tokens: int) -> None:
        """Note the step that ended now."""
        self._write({"step": step, "tokens": tokens})

    def _write(self, line: dict[str, Any]) -> None:
        timed, now = self.ledger.clock.steps, time.perf_counter()
        packs = self.ledger.packs[self.packed :]
        line |= {"wall": now - self.began, "phases": timed[self.timed :], "memory": self.memory.figures()}
        line |= {"work": self._work(packs), "largest": [pack.as_dict() for step in packs for pack in self._new(step)]}
        if self.ledger.energy is not None:
            line["energy"] = self._energy(self.ledger.energy)
        self.timed, self.packed, self.began = len(timed), self.packed + len(packs), now
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()

    def _work(self, steps: list[tuple[PackShape, ...]]) -> dict[str, Any]:
        return asdict(total_work([Work.of(self.bank.config, pack) for step in steps for pack in step]))

    def _new(self, step: tuple[PackShape, ...]) -> list[PackShape]:
        """The packs of a step that are larger than all before by one of their sizes."""
        found = []
        for pack in step:
            most = list(map(max, pack.sizes(self.bank.config), self._largest or pack.sizes(self.bank.config)))
            if most != self._largest:
                found.append(pack)
                self._largest = most
        return found

    def _energy(self, meter: EnergyMeter) -> dict[str, Any]:
        """Joules since the line before, of all and of each phase."""
        now = {**meter.joules, "training": meter.total()}
        since = {phase: value - self._joules.get(phase, 0.0) for phase, value in now.items()}
        self._joules = now
        return {"lost": True} if meter.lost else {"source": meter.source(), "joules": since}


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file that is whole JSON."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
