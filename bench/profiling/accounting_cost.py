"""What accounting itself costs a step: its own work, timed apart from the step, which is far larger than its noise."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.steps import StepLog
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Phase
from peftdyno.kernels import memory

REPEATS = 50
PHASES: tuple[Phase, ...] = ("data", "forward", "forward", "backward", "backward", "optimizer")
"""What a step of one pack enters."""


def accounting_cost(bench: Bench, steps: int) -> dict[str, Any]:
    """Seconds of the processor a step, the least of several: `step_seconds` without accounting, `bookkeeping_seconds`
    of clock, meter, energy and the line on disk, and `recording_seconds` that the CPU's allocator takes longer for the
    step's `allocations`; `share` is both over the step. Counted steps, of which a training has one, are not among them.
    """
    off = Ledger(bench.decoder.scope, on=False)
    step = _least(lambda: bench.step(off), steps)
    bookkeeping = max(_bookkeeping(bench) - _least(lambda: _phases(off), REPEATS), 0.0)
    allocations, recording = _recording(bench, off)
    return {
        "step_seconds": step,
        "bookkeeping_seconds": bookkeeping,
        "allocations": allocations,
        "recording_seconds": recording,
        "share": (bookkeeping + recording) / step,
    }


def _bookkeeping(bench: Bench) -> float:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.of(bench.decoder, bench.bank)
        ledger.num_steps = 1  # the step that a training counts is over
        with StepLog(Path(folder), ledger, bench.decoder, bench.bank) as log:

            def account() -> None:
                ledger.see(bench.pack)
                _phases(ledger)
                ledger.end_step()
                log.append(ledger.num_steps, ledger.tokens[-1])

            return _least(account, REPEATS)


def _phases(ledger: Ledger) -> None:
    for phase in PHASES:
        with ledger.phase(phase):
            pass


def _recording(bench: Bench, off: Ledger) -> tuple[int, float]:
    """Allocations of a step, and how much longer as many take while they are recorded; 0 on a card, whose allocator
    keeps its peak anyway."""
    if bench.decoder.device.type != "cpu" or not memory.available():
        return 0, 0.0
    with memory.AllocatorPeak() as recorder:
        bench.step(off)

    def allocate() -> None:
        for _ in range(recorder.allocations):
            torch.empty(64)

    plain = _least(allocate, REPEATS)
    with memory.AllocatorPeak():
        recorded = _least(allocate, REPEATS)
    return recorder.allocations, max(recorded - plain, 0.0)


def _least(work: Callable[[], None], repeats: int) -> float:
    """Processor seconds of the least disturbed of several turns, after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)
