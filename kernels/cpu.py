"""The compiled CPU kernels, where they were built: `kernel(name)` gives the C++ operator or None."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def _load() -> bool:
    try:
        importlib.import_module("peftdyno.kernels._cpu")
    except ImportError:
        return False
    return True


AVAILABLE = _load()
"""Whether the C++ extension was built and loads."""


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """`{"cpu": operator}` where the extension has the operator `peftdyno_cpu::name`, else nothing."""
    if not AVAILABLE or not hasattr(torch.ops.peftdyno_cpu, name):
        return {}
    return {"cpu": getattr(torch.ops.peftdyno_cpu, name).default}
