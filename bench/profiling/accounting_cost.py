"""What accounting itself costs a step: the same steps with it on and off, in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.steps import StepLog
from peftdyno.engine.accounting.ledger import Ledger

TURNS = 4
"""Blocks of steps with accounting, and as many without."""


def accounting_cost(bench: Bench, steps: int) -> dict[str, Any]:
    """Seconds of a step `on` and `off`, medians over blocks of `steps` in turns; `share` is the difference over `off`.

    On: clock, meter of live tensors, energy where there is a counter, and a line a step on disk, as in a training;
    counted steps (the first of a training) are not among them. On the CPU the seconds are those of the processor, so
    that other programs disturb them less; on a card they are the wall's.
    """
    taken: dict[str, list[float]] = {"on": [], "off": []}
    for _ in range(TURNS):
        taken["on"] += _with_accounting(bench, steps)
        taken["off"] += _without(bench, steps)
    on, off = (statistics.median(values) for values in taken.values())
    return {"on_seconds": on, "off_seconds": off, "share": on / off - 1, "steps": len(taken["on"])}


def _with_accounting(bench: Bench, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.of(bench.decoder, bench.bank)
        ledger.num_steps = 1  # the step that a training counts is over
        with StepLog(Path(folder), ledger, bench.decoder, bench.bank) as log:

            def step() -> None:
                bench.step(ledger)
                log.append(ledger.num_steps, ledger.tokens[-1])

            return _timed(step, steps, bench.decoder.device)


def _without(bench: Bench, steps: int) -> list[float]:
    ledger = Ledger(bench.decoder.scope, on=False)
    return _timed(lambda: bench.step(ledger), steps, bench.decoder.device)


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Seconds of each step; one more before them warms up."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    step()
    found = []
    for _ in range(steps):
        _wait(device)
        start = clock()
        step()
        _wait(device)
        found.append(clock() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
