"""Measure tiles and forms on this GPU and keep the fastest: what `peftdyno tune` runs.

Tiles are climbed from the shipped one to whichever neighbour is fastest, until none is; then each operator with
several forms is timed in all of them, with those tiles. A candidate counts where its results stay right and it is
faster by more than the spread of repeated measurements. `tuning.save` writes what was found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from peftdyno.kernels import tuning
from peftdyno.kernels.triton.tune_subjects import FormSubject, Subject, TuneSizes, form_subjects, subjects
from peftdyno.kernels.tuning import Tile

MARGIN = 1.02
"""A candidate must be faster by this factor."""

Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""
Report = Callable[[str, dict[str, Any]], None]
"""Told each entry as it is found, so that an interrupt loses no other."""


def tune(
    sizes: TuneSizes, device: torch.device, only: str = "", *, timer: Timer | None = None, report: Report | None = None
) -> dict[str, dict[str, Any]]:
    """Fastest tile of each kernel and form of each operator whose name contains `only`, for `tuning.save`:
    {kernel and shape class: {tile, ms, shipped_ms}, operator and shape class: {form, ms of each form}}."""
    clock = timer or (lambda call: milliseconds([call], device))
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str, entry: dict[str, Any]) -> None:
        found[name] = entry
        if report is not None:
            report(name, entry)

    with ExitStack() as tiles:
        for subject in subjects(sizes, device):
            if only in subject.name and subject.name not in found:
                keep(subject.name, fastest_tile(subject, device, clock))
                tiles.enter_context(tuning.trial(subject.name, found[subject.name]["tile"]))
        for choice in form_subjects(sizes, device):
            if only in choice.name and choice.name not in found:
                keep(choice.name, fastest_form(choice, clock))
    return found


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles that differ in one size: halved or doubled, or a stage more or less."""
    found = [replace(tile, rows=n) for n in (tile.rows // 2, tile.rows * 2)]
    found += [replace(tile, columns=n) for n in (tile.columns // 2, tile.columns * 2)]
    found += [replace(tile, warps=n) for n in (4, 8) if n != tile.warps]
    found += [replace(tile, stages=n) for n in (tile.stages - 1, tile.stages + 1)]
    widest = max(256, tile.columns)
    return [t for t in found if 16 <= t.rows <= 256 and 16 <= t.columns <= widest and 1 <= t.stages <= 5]


def fastest_tile(subject: Subject, device: torch.device, clock: Timer) -> dict[str, Any]:
    """The tile that no neighbour beats, from the shipped one on."""
    shipped = tuning.SHIPPED[subject.kernel][tuning.architecture(device)]
    with tuning.trial(subject.name, shipped):
        truth, baseline = subject.call(), clock(subject.call)
    best, best_ms, times = shipped, baseline, {shipped: baseline}
    while True:
        for tile in neighbours(best):
            if tile not in times:
                ms = _trial(tuning.trial(subject.name, tile), subject.call, truth, clock)
                times[tile] = float("inf") if ms is None else ms
        tile = min(times, key=lambda t: times[t])
        if times[tile] * MARGIN >= best_ms:
            return {"tile": best, "ms": best_ms, "shipped_ms": baseline}
        best, best_ms = tile, times[tile]


def fastest_form(subject: FormSubject, clock: Timer) -> dict[str, Any]:
    """The default form, unless another is faster by the margin."""
    default, *others = subject.forms
    with tuning.trial_form(subject.operator, default):
        truth, baseline = subject.call(), clock(subject.call)
    times: dict[str, float | None] = {default: baseline}
    for form in others:
        times[form] = _trial(tuning.trial_form(subject.operator, form), subject.call, truth, clock)
    right = {form: ms for form, ms in times.items() if ms is not None}
    best = min(right, key=lambda form: right[form])
    return {"form": best if right[best] * MARGIN < baseline else default, "ms": times}


def _trial(choice: AbstractContextManager[None], call: Callable[[], Any], truth: Tensor, clock: Timer) -> float | None:
    """Milliseconds of a candidate, or None where it does not fit or its results differ."""
    with choice:
        try:
            result = call()
        except TritonError:  # too much memory, no layout, or an assembler that gives up
            return None
        except RuntimeError as error:
            if "PassManager" not in str(error):  # what the compiler raises for a tile that it cannot lay out
                raise
            return None
        gap = float((result.float() - truth.float()).norm() / truth.float().norm())
        return clock(call) if gap < 2 * torch.finfo(result.dtype).eps else None


FLUSH = 256 * 2**20
"""Bytes written before each timed call: more than any L2 cache holds (60 MB on an H200)."""


def milliseconds(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call on the device that finds none of its operands in the L2 cache, as in a step of training;
    the calls (the same on different data) take turns.

    The queue is filled while the device sleeps, so that launches are not waited for.
    """
    if device.type != "cuda":
        raise ValueError("kernels are timed on a CUDA device; this machine has none")
    for call in calls:
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    others = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    for i, (start, end) in enumerate(pairs):
        others.zero_()
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    median: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
    return median
