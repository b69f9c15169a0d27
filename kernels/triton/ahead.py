"""Compile every kernel for five generations of GPUs without having one, and hold what it uses to its limits.

sm_89 and sm_120 stand for the consumers' GPUs, which take sm_80's tiles: they must fit 99 KB of shared memory. Run
`python -m peftdyno.kernels.triton.ahead [--arch 90] [--only NAME] [--json FILE]`; exits with 1 where one is broken.
Tensor-core instructions are read off the machine code: HMMA (Ampere), HGMMA (Hopper), UTC*MMA (Blackwell). So is a
kernel's work: the instructions of its longest loop, or of all of it, for one element of its tile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftdyno.kernels.triton import machine_code
from peftdyno.kernels.triton.compiled import Compiled
from peftdyno.kernels.tuning import shipped_for

MODULES = (
    "row_chunks",
    "rms_norm",
    "glu",
    "rotary",
    "bank_affine",
    "label_loss",
    "picked_rows",
    "adamw",
    "dropout",
    "low_rank",
    "skinny",
    "output_gradient",
    "low_rank_input",
    "glu_lora",
    "lora_gemm",
    "nf4",
    "nf4_gemm",
    "attention",
    "attention_backward",
)
ARCHITECTURES = (80, 89, 90, 100, 120)
SMALL = 99 * 1024
"""Bytes of shared memory that sm_80's tiles may take: what a program has on consumers' GPUs."""


@dataclass(frozen=True)
class Usage:
    """What one kernel uses on one architecture; `broken` names the limits it exceeds."""

    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    matrix: str
    work: float
    broken: tuple[str, ...]


def cases() -> list[Compiled]:
    """All variants, in the order of the modules; those with matrix products for 32-bit elements too."""
    found: list[Compiled] = []
    for name in MODULES:
        found += importlib.import_module(f"peftdyno.kernels.triton.{name}").COMPILED
    return found + [case.in_fp32() for case in found if "PRECISION" in case.constants]


def _attributes(case: Compiled) -> dict[tuple[int, ...], list[list[Any]]]:
    """Pointers, strides and widths are multiples of 16 in models of any size; other integers are what they are."""
    names = case.kernel.arg_names
    wide = [n for n, t in case.signature.items() if t.startswith("*") or n in case.aligned]
    return {(names.index(n),): [["tt.divisibility", 16]] for n in wide}


def compiled(case: Compiled, arch: int) -> Any:
    """The compiled kernel."""
    signature = {
        n: "constexpr" if n in case.constants else case.signature[n].format(**case.constants)
        for n in case.kernel.arg_names
    }
    constants = {(case.kernel.arg_names.index(n),): value for n, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, _attributes(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(case: Compiled, arch: int) -> Usage:
    """What the kernel uses, against its limits."""
    tiles, case = shipped_for(arch), case.on(shipped_for(arch))
    kernel = compiled(case, arch)
    code, shared, limits = machine_code.read(kernel.asm["cubin"]), kernel.metadata.shared, case.limits
    most_spills = limits.spills_sm_100 if tiles == 100 else limits.spills
    most_shared = min(limits.shared, SMALL) if tiles == 80 else limits.shared
    expected, most_work = limits.matrix.get(tiles, ""), limits.work.get(tiles, float("inf"))
    work = code.longest / case.elements_a_thread if case.elements_a_thread else 0.0
    checks = {
        f"registers > {limits.registers}": code.registers > limits.registers,
        f"spills > {most_spills}": code.spills > most_spills,
        f"shared > {most_shared}": shared > most_shared,
        f"{code.matrix or 'no tensor cores'} instead of {expected or 'none'}": code.matrix != expected,
        f"instructions an element > {most_work}": work > most_work,
    }
    broken = tuple(n for n, bad in checks.items() if bad)
    return Usage(case.name, arch, code.registers, code.spills, shared, code.matrix, round(work, 1), broken)


def _measure(place: tuple[int, int]) -> Usage:
    number, arch = place
    return measure(cases()[number], arch)


def measured(only: str, architectures: Sequence[int]) -> list[Usage]:
    """Of every case whose name has `only` in it, on every architecture; a process a core."""
    places = [(i, arch) for i, case in enumerate(cases()) if only in case.name for arch in architectures]
    with multiprocessing.get_context("spawn").Pool(min(len(os.sched_getaffinity(0)), max(1, len(places)))) as pool:
        return pool.map(_measure, places, chunksize=1)


def table(usages: list[Usage]) -> str:
    """One line a kernel and architecture."""
    lines = [f"{'kernel':<34}{'arch':>7}{'regs':>6}{'spill':>7}{'shared':>8}{'work':>6}  tensor cores"]
    for u in usages:
        broken = f"  <- {', '.join(u.broken)}" if u.broken else ""
        arch = f"sm_{u.arch}"
        work = f"{u.work:.1f}" if u.work else "-"
        used = f"{u.registers:>6}{u.spills:>7}{u.shared:>8}{work:>6}"
        lines.append(f"{u.kernel:<34}{arch:>7}{used}  {u.matrix or '-'}{broken}")
    return "\n".join(lines)


def main() -> int:
    """Compile, print the table, and say with the exit code whether every limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="part of the kernel's name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    usages = measured(options.only, options.arch or ARCHITECTURES)
    print(f"triton {triton.__version__}\n{table(usages)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(u) for u in usages], indent=1))
    return int(not usages or any(u.broken for u in usages))


if __name__ == "__main__":
    sys.exit(main())
