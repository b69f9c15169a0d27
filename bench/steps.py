"""StepLog: what each step took on the clock and in memory, on disk, so that a resumed run still knows all of it."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from peftdyno.bench.peak_memory import PeakMemory
from peftdyno.engine.accounting.ledger import Ledger

FILE = "steps.jsonl"
WARM_UP = 3
"""Steps at the start that the percentiles leave out, where there are many more."""
BETWEEN = "evaluation"
"""The ledger's phase that lies between steps: validation. In a record, `evaluation` is the scoring of test rows."""


@dataclass
class StepLog:
    """Appends a line a step to steps.jsonl; a step repeated after a kill has two lines, as both were spent.

    `wall` is all the time since the line before, validation and checkpoints included; `phases` are the ledger's
    seconds of steps it has timed since, which on a device may be of earlier ones.
    """

    folder: Path
    ledger: Ledger
    memory: PeakMemory
    file: BinaryIO = field(init=False)
    began: float = field(init=False)
    seen: int = 0

    def __enter__(self) -> StepLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / FILE).open("ab")
        self.began = time.perf_counter()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.ledger.clock.read()
            self._write({"tokens": 0})
        self.file.close()

    def append(self, step: int, tokens: int) -> None:
        """Note the step that ended now."""
        self._write({"step": step, "tokens": tokens})

    def _write(self, line: dict[str, Any]) -> None:
        timed, now = self.ledger.clock.steps, time.perf_counter()
        line |= {"wall": now - self.began, "phases": timed[self.seen :], "memory": self.memory.figures()}
        self.seen, self.began = len(timed), now
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()

    def summary(self) -> StepSummary:
        """Of all steps there have been."""
        return summarise(self.folder / FILE)


@dataclass(frozen=True, kw_only=True)
class StepSummary:
    """Seconds in all and by phase, percentiles of one step, peaks of memory, and tokens computed."""

    wall: float
    phases: dict[str, float]
    step: dict[str, float]
    memory: dict[str, int]
    tokens: int

    def seconds(self) -> dict[str, float]:
        """For a record's `time`."""
        return {"training": self.wall, **self.phases, **self.step}


def summarise(path: Path) -> StepSummary:
    """Sums and peaks of a file of steps; a line cut short by a kill is left out."""
    lines = _whole_lines(path)
    timed = [step for line in lines for step in line["phases"]]
    phases: dict[str, float] = {}
    memory: dict[str, int] = {}
    for step in timed:
        for phase, value in step.items():
            name = "validation" if phase == BETWEEN else phase
            phases[name] = phases.get(name, 0.0) + value
    for line in lines:
        for name, value in line["memory"].items():
            memory[name] = max(memory.get(name, 0), value)
    took = [sum(value for phase, value in step.items() if phase != BETWEEN) for step in timed]
    took = took[WARM_UP:] if len(took) >= 4 * WARM_UP else took
    return StepSummary(
        wall=sum(line["wall"] for line in lines),
        phases=phases,
        step=_percentiles(took),
        memory=memory,
        tokens=sum(line["tokens"] for line in lines),
    )


def _percentiles(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile; nothing of no values."""
    if len(values) < 2:
        return {"step_median": values[0]} if values else {}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"step_median": statistics.median(values), "step_p10": tenths[0], "step_p90": tenths[-1]}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
