"""Profile of a training step: time by phase, a table by phase and operator, a trace, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.profiling.ceiling import DTYPES, ceilings
from peftdyno.bench.profiling.energy import joules
from peftdyno.bench.profiling.memory_page import write_memory_page
from peftdyno.bench.profiling.op_timer import OpTimer
from peftdyno.engine.accounting.counting import Counter
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory_predict import follow_step
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.summary import summary
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack
from peftdyno.engine.weights import random_weights


@dataclass
class Bench:
    """A model of random weights, whose values no cost depends on, a bank, and a pack to train on."""

    decoder: Decoder
    bank: AdapterBank
    optimizer: AdamW
    pack: Pack

    @classmethod
    def of(cls, job: Job, batch: int, length: int) -> Bench:
        """Everything that a step needs, on the job's device."""
        weights = random_weights(job.config, job.dtype, device=job.device)
        bank = AdapterBank.create(job.config, job.methods, range(len(job.methods)), weights)
        pack = job.plain_pack(batch, length).to(job.device)
        return cls(Decoder(job.config, weights), bank, AdamW.create(bank), pack)

    def step(self, ledger: Ledger) -> None:
        """One training step at rate 0."""
        run_step(self.decoder, self.bank, self.optimizer, [self.pack], ledger)
        ledger.end_step()


def profile(job: Job, batch: int, length: int, steps: int, folder: Path) -> dict[str, Any]:
    """Run `steps` timed steps and a few watched ones; writes trace.json and memory.html into the folder.

    The first step is counted, the next three are warm-up. Seconds of operators are from one further step, and
    so is the trace; `share_of_matmul` and `share_of_copy` are of the measured ceilings of this machine.
    """
    bench = Bench.of(job, batch, length)
    device = bench.decoder.device
    ledger = Ledger.of(bench.decoder, bench.bank)
    for _ in range(4):
        bench.step(ledger)
    before = joules(device)
    for _ in range(steps):
        bench.step(ledger)
    times = summary(ledger)
    after = joules(device)
    folder.mkdir(parents=True, exist_ok=True)
    _write_trace(bench, folder / "trace.json")
    log = follow_step(bench.decoder, bench.bank, bench.optimizer, [bench.pack], probe=True)
    title = f"{job.methods[0].name}, batch {batch} x {length}"
    write_memory_page(log, folder / "memory.html", title)
    limits = ceilings(device)
    return {
        **times,
        "ceilings": limits,
        "operators": _operators(bench, limits, job.dtype),
        "energy_joules_a_step": None if before is None or after is None else (after - before) / steps,
        "memory": {**times["memory"], "followed_peak_bytes": log.peak_bytes},
        "files": [str(folder / name) for name in ("trace.json", "memory.html")],
    }


def _write_trace(bench: Bench, path: Path) -> None:
    """A Chrome trace of one step, which Perfetto and TensorBoard open."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.decoder.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as recorded:
        bench.step(Ledger(bench.decoder.scope, on=False))
    recorded.export_chrome_trace(str(path))


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
