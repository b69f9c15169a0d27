"""Energy that the hardware's own counters say was used; absent where none can be read, and never estimated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")


def joules(device: torch.device) -> float | None:
    """The counter's present value: of the graphics card on CUDA (NVML), else of the processor packages (Linux RAPL)."""
    return _card(device) if device.type == "cuda" else _packages()


def _packages() -> float | None:
    files = sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))
    try:
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except OSError:
        return None


def _card(device: torch.device) -> float | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError:
        return None
