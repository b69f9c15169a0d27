"""What Python sees of the device: `torch.cuda` without its library, and Triton's interpreter on the device's memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import time
import types
from pathlib import Path
from typing import Any

CAPABILITY, MULTIPROCESSORS = (9, 0), 132
_counters: ctypes.CDLL


def load(library: Path) -> None:
    """Put the device in place; before torch is imported, which looks for one once."""
    global _counters
    (package,) = importlib.util.find_spec("torch").submodule_search_locations
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(f"{package}/lib/{name}", ctypes.RTLD_GLOBAL)
    _counters = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    for name in ("allocated", "peak", "waits"):
        getattr(_counters, f"host_gpu_{name}").restype = ctypes.c_int64


def waits() -> int:
    """Copies and reads so far that waited for the device."""
    return _counters.host_gpu_waits()


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.seconds - self.seconds)

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


def _memory_stats(device: Any = None) -> dict[str, int]:
    current, peak = _counters.host_gpu_allocated(), _counters.host_gpu_peak()
    stats = {"allocated_bytes.all.current": current, "allocated_bytes.all.peak": peak}
    return stats | {"reserved_bytes.all.current": current, "reserved_bytes.all.peak": peak}


def install() -> None:
    """Replace what `torch.cuda` asks of its library, and how Triton's interpreter reaches memory."""
    import torch

    properties = types.SimpleNamespace(multi_processor_count=MULTIPROCESSORS, L2_cache_size=50 << 20)
    answers = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": "Host", "get_device_capability": CAPABILITY, "get_device_properties": properties,
        "synchronize": None, "empty_cache": None, "manual_seed_all": None, "graph_pool_handle": 0,
        "mem_get_info": (64 << 30, 64 << 30), "stream": contextlib.nullcontext(), "current_stream": _Stream(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **options: _answer)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.memory_stats = _Event, _Stream, _memory_stats
    torch.cuda.reset_peak_memory_stats = lambda device=None: _counters.host_gpu_reset_peak()
    torch.cuda.max_memory_allocated = lambda device=None: _counters.host_gpu_peak()
    _interpret_in_place()


def _interpret_in_place() -> None:
    """Kernels read and write where tensors lie, and fail where one lies on the CPU, as a GPU would."""
    from triton.runtime.interpreter import GridExecutor

    def arguments(_: Any, args: Any, options: Any) -> Any:
        return [_on_host(value) for value in args], {name: _on_host(value) for name, value in options.items()}

    GridExecutor._init_args_hst = arguments
    GridExecutor._restore_args_dev = lambda *_: None


def _on_host(value: Any) -> Any:
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, TensorDescriptor):
        changed = vars(value) | {"base": _on_host(value.base)}
        return TensorDescriptor(**changed)
    if not isinstance(value, torch.Tensor):
        return value
    assert value.is_cuda, f"a kernel got a CPU tensor of shape {tuple(value.shape)}"
    with torch._C._DisableTorchDispatch():
        return torch.ops.host_gpu.host(value.detach())
