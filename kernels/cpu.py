"""The compiled CPU kernels, where they were built: which operators there are, and the instruction set in force."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch


def _load() -> bool:
    try:
        importlib.import_module("peftdyno.kernels._cpu")
    except ImportError:
        return False
    torch.ops.peftdyno_cpu.memory_retain()  # the process keeps what it frees (glibc); see csrc/cpu/memory.cpp
    return True


AVAILABLE = _load()
"""Whether the C++ extension was built and loads."""

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
"""What PEFTDYNO_ISA may name, the fastest first."""


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """`{"cpu": operator}` where the extension has the operator `name`, else nothing: the plain function where there is
    one, for it is called many times a step, else torch's operator `peftdyno_cpu::name`."""
    if not AVAILABLE or not hasattr(torch.ops.peftdyno_cpu, name):
        return {}
    return {"cpu": getattr(extension(), name, getattr(torch.ops.peftdyno_cpu, name).default)}


def extension() -> Any:
    """The compiled module."""
    return importlib.import_module("peftdyno.kernels._cpu")


def instruction_set() -> str:
    """The instruction set in force: the best of this processor's unless PEFTDYNO_ISA names another.

    Raises ValueError where the variable names one that does not exist or that the processor lacks.
    """
    if not AVAILABLE:
        raise ValueError("PEFTDYNO_ISA: the C++ kernels are not built, so there is none to choose; unset it")
    try:
        name: str = torch.ops.peftdyno_cpu.isa()
    except RuntimeError as error:
        raise ValueError(f"PEFTDYNO_ISA: {_first_line(error)}") from None
    return name


def use_instruction_set(name: str) -> None:
    """Put another instruction set in force in this process. Raises ValueError for one that cannot run here."""
    try:
        torch.ops.peftdyno_cpu.use_isa(name)
    except RuntimeError as error:
        raise ValueError(_first_line(error)) from None


def instruction_sets() -> list[str]:
    """Those that this processor can run."""
    before, found = instruction_set(), []
    for name in INSTRUCTION_SETS:
        try:
            use_instruction_set(name)
        except ValueError:
            continue
        found.append(name)
    use_instruction_set(before)
    return found


def describe() -> str:
    """Which kernels run on the CPU and why, in a line: compiled ones with their instruction set, or PyTorch's."""
    if not AVAILABLE:
        return "PyTorch operations: the C++ extension is not built"
    why = "named by PEFTDYNO_ISA" if os.environ.get("PEFTDYNO_ISA") else "the fastest of this processor"
    return f"compiled C++, {instruction_set()} ({why}; it can run {', '.join(instruction_sets())})"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
