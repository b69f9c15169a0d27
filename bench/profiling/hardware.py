"""FLOPs and bytes of a step as the card's own counters see them, by Nsight Compute, beside what is counted."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.profiling.spec import Spec
from peftdyno.engine.accounting.counting import Counter
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.errors import UserError

PHASES = ("forward", "backward", "optimizer")
TENSOR = ("sm__ops_path_tensor_src_bf16_dst_fp32.sum", "sm__ops_path_tensor_src_tf32_dst_fp32.sum")
"""Operations of tensor cores, 2 a multiply-add."""
FMA = ("smsp__sass_thread_inst_executed_op_ffma_pred_on.sum",)
"""Multiply-adds of the ordinary units, one a thread."""
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")
METRICS = TENSOR + FMA + DRAM
NO_PERMISSION = "ERR_NVGPUCTRPERM"
Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What one launch of a kernel did."""

    name: str
    tensor_flops: int
    fma_flops: int
    dram_bytes: int


def hardware_profile(spec: Spec, run: Run | None = None) -> dict[str, Any]:
    """By phase: what is counted, what tensor cores and multiply-add units did, and the bytes that crossed to memory.

    UserError where there is no NVIDIA card, no `ncu`, or no permission to read counters.
    """
    tool = _find_tool(spec)
    found = {phase: measure(tool, spec, phase, run or _run) for phase in PHASES}
    bench = Bench.of(spec.job(), spec.batch, spec.length)
    counter = Counter(bench.decoder.scope)
    bench.step(Ledger(bench.decoder.scope, counter=counter))
    counted = {str(phase): charge for (phase,), charge in counter.tally.by("phase").items()}
    return {
        "device": torch.cuda.get_device_name(),
        "phases": {
            phase: compare(kernels, counted[phase].matrix, counted[phase].bytes) for phase, kernels in found.items()
        },
    }


def _find_tool(spec: Spec) -> str:
    if spec.device != "cuda" or not torch.cuda.is_available():
        raise UserError("--hardware reads the counters of an NVIDIA card, and there is none here")
    tool = shutil.which("ncu")
    if tool is None:
        raise UserError("--hardware needs Nsight Compute: `ncu` is not on PATH; it comes with the CUDA toolkit")
    return tool


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def measure(tool: str, spec: Spec, phase: str, run: Run) -> list[Kernel]:
    """Every kernel of one phase of a step; UserError with what the tool says where it gives no figures."""
    command = [tool, "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--nvtx", "--nvtx-include", phase, sys.executable, "-P", "-m", "peftdyno.bench.profiling.one_step"]
    done = run([*command, json.dumps(asdict(spec))])
    said = done.stdout + done.stderr
    if NO_PERMISSION in said:
        raise UserError(
            f"--hardware: the driver keeps the card's counters to the administrator ({NO_PERMISSION}); run as root, or "
            "load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if done.returncode != 0:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing")
        raise UserError(f"--hardware: {tool} ended with {done.returncode} in {phase} and said: {last.strip()}")
    return parse(done.stdout)


def parse(text: str) -> list[Kernel]:
    """Kernels of the tool's CSV: a header, a row of units, a row a launch; lines before the header are its news.

    UserError where there is no header or a figure is missing: no figure is taken for 0.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise UserError("--hardware: ncu printed no table; no kernel ran in the phase, or it knows none of the metrics")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    missing = [name for name in METRICS if name not in rows[0]] if rows else []
    if missing:
        raise UserError(f"--hardware: this card's counters lack {', '.join(missing)}")
    return [_kernel(row) for row in rows if row["ID"]]


def _kernel(row: dict[str, str]) -> Kernel:
    def total(names: Iterable[str]) -> int:
        return round(sum(_number(row, name) for name in names))

    return Kernel(name=row["Kernel Name"], tensor_flops=total(TENSOR), fma_flops=2 * total(FMA), dram_bytes=total(DRAM))


def _number(row: dict[str, str], name: str) -> float:
    try:
        return float(row[name].replace(",", ""))
    except ValueError:
        raise UserError(f"--hardware: {name} of {row['Kernel Name']} is '{row[name]}', not a number") from None


def compare(kernels: Sequence[Kernel], matrix_flops: int, counted_bytes: int) -> dict[str, Any]:
    """Sums beside what was counted. `counted_over_hardware` is of matrix FLOPs over those of tensor cores, or of the
    multiply-add units where no tensor core ran (whose sum has pointwise work in it too); null where neither did."""
    by_name: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    tensor, fma = sum(k.tensor_flops for k in kernels), sum(k.fma_flops for k in kernels)
    hardware = tensor or fma
    return {
        "counted_matrix_flops": matrix_flops,
        "counted_bytes_at_least": counted_bytes,
        "tensor_flops": tensor,
        "fma_flops": fma,
        "dram_bytes": sum(k.dram_bytes for k in kernels),
        "counted_over_hardware": matrix_flops / hardware if hardware else None,
        "kernels": sorted((_summed(name, some) for name, some in by_name.items()), key=lambda k: -k["tensor_flops"]),
    }


def _summed(name: str, kernels: Sequence[Kernel]) -> dict[str, Any]:
    sums = {f: sum(getattr(k, f) for k in kernels) for f in ("tensor_flops", "fma_flops", "dram_bytes")}
    return {"kernel": name, "launches": len(kernels), **sums}
