"""Profile of a training step: time by phase, a table by phase and operator, a trace, and memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.profiling.accounting_cost import accounting_cost
from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.profiling.ceiling import DTYPES, ceilings
from peftdyno.bench.profiling.memory_page import write_memory_page
from peftdyno.bench.profiling.op_timer import OpTimer
from peftdyno.engine.accounting.counting import Counter
from peftdyno.engine.accounting.energy import EnergyMeter, energy_counter, energy_metered
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory_predict import follow_step
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.accounting.summary import summary


def profile(job: Job, batch: int, length: int, steps: int, folder: Path) -> dict[str, Any]:
    """Run `steps` timed steps and a few watched ones; writes trace.json, tensorboard/ and memory.html into the folder.

    The first step is counted, the next three are warm-up. Seconds of operators are from one further step, and
    so is the trace; `share_of_matmul` and `share_of_copy` are of the measured ceilings of this machine.
    """
    bench = Bench.of(job, batch, length)
    device = bench.decoder.device
    ledger = Ledger.of(bench.decoder, bench.bank)
    for _ in range(4):
        bench.step(ledger)
    with energy_metered(energy_counter(device)) as energy:
        ledger.energy = energy
        before = energy.total() if energy else 0.0
        for _ in range(steps):
            bench.step(ledger)
        times = summary(ledger)
        used = _energy(energy, before, steps)
    ledger.energy = None
    traces = _write_traces(bench, folder)
    log = follow_step(bench.decoder, bench.bank, bench.optimizer, [bench.pack], probe=True)
    title = f"{job.methods[0].name}, batch {batch} x {length}"
    write_memory_page(log, folder / "memory.html", title)
    limits = ceilings(device)
    return {
        **times,
        "ceilings": limits,
        "operators": _operators(bench, limits, job.dtype),
        "energy": used,
        "accounting": accounting_cost(bench, steps),
        "memory": {**times["memory"], "followed_peak_bytes": log.peak_bytes},
        "files": [str(path) for path in (*traces, folder / "memory.html")],
    }


def _energy(meter: EnergyMeter | None, before: float, steps: int) -> dict[str, Any] | None:
    """Joules a step, of all and by phase as finely as the counter tells; None where there is no counter."""
    if meter is None:
        return None
    total = (meter.total() - before) / steps
    phases = {phase: joules / steps for phase, joules in meter.joules.items()}
    return None if meter.lost else {**meter.source(), "joules_a_step": total, "phases": phases}


def _write_traces(bench: Bench, folder: Path) -> list[Path]:
    """A trace of one step: trace.json for Chrome and Perfetto, and the same under the name that TensorBoard's profiler
    (torch-tb-profiler) looks for."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.decoder.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as recorded:
        bench.step(Ledger(bench.decoder.scope, on=False))
    chrome, board = folder / "trace.json", folder / "tensorboard" / "step.pt.trace.json"
    board.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(chrome))
    shutil.copyfile(chrome, board)
    return [chrome, board]


def _operators(bench: Bench, limits: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Seconds, FLOPs and bytes by phase and operator, the slowest first."""
    scope = bench.decoder.scope
    counter, timer = Counter(scope), OpTimer(scope, bench.decoder.device)
    bench.step(Ledger(scope, counter=counter))
    with timer:
        bench.step(Ledger(scope, on=False))
    costs = counter.tally.by("phase", "operator")
    name = next(name for name, known in DTYPES.items() if known == dtype)
    matmul, copy = limits["matmul_flops"][name], limits["copy_bytes"]
    rows = []
    for key, seconds in sorted(timer.read().items(), key=lambda item: -item[1]):
        charge = costs.get(key)
        if charge is None:
            continue
        rows.append(
            {
                "phase": key[0],
                "operator": key[1],
                "seconds": seconds,
                "calls": charge.calls,
                "matrix_flops": charge.matrix,
                "other_flops": charge.pointwise + charge.reduction,
                "bytes": charge.bytes,
                "share_of_matmul": charge.matrix / seconds / matmul,
                "share_of_copy": charge.bytes / seconds / copy,
            }
        )
    return rows
