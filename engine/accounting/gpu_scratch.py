"""Scratch on a GPU: what a Triton operator holds during a call, and what PyTorch keeps for cuBLAS.

An operator's scratch is found by the code that launches it: it runs on tensors without storage, launches left out.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.engine.accounting.formulas import tensors
from peftdyno.kernels import dispatch, triton, tuning

GPU = torch.device("cuda")


def cublas_bytes() -> int:
    """What PyTorch keeps for cuBLAS from the first product on: 32 MiB on Hopper and Blackwell, 8.1 MiB before them, or
    what CUBLAS_WORKSPACE_CONFIG says (`parseChosenWorkspaceSize` in PyTorch's CublasHandlePool.cpp)."""
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        return sum(1024 * int(size) * int(count) for size, count in asked)
    return 32 << 20 if tuning.architecture(GPU) >= 90 else (8 << 20) + (128 << 10)


@dataclass(frozen=True)
class Event:
    """A storage is born, or dies where `nbytes` is None. `result`: its place among the results' storages, or -1."""

    storage: int
    nbytes: int | None
    result: int = -1


class TritonScratch:
    """What Triton operators allocate during a call; found once for arguments that look alike."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Event, ...]] = {}

    def of(self, operator: str, arguments: Sequence[Any]) -> tuple[Event, ...]:
        """In order, of one call. Tables on the CPU are read, other tensors only for their layout."""
        key = operator, _appearance(arguments)
        if key not in self._found:
            self._found[key] = _events(operator, _without_storage(arguments))
        return self._found[key]


def _appearance(value: Any) -> Any:
    """What decides how an argument is computed with, as a key."""
    if isinstance(value, (list, tuple)):
        return tuple(_appearance(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu":
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    return value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.untyped_storage().nbytes()


def _without_storage(value: Any) -> Any:
    """Arguments whose tensors lie as those given do, on the meta device."""
    if isinstance(value, (list, tuple)):
        return type(value)(_without_storage(item) for item in value)
    if not isinstance(value, Tensor) or value.device.type in ("cpu", "meta"):
        return value
    whole = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device="meta")
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _events(operator: str, arguments: Sequence[Any]) -> tuple[Event, ...]:
    seen = _Allocations(arguments)
    with dispatch.shapes_of(GPU), no_launches(), seen:
        results = triton.load(operator)(*arguments)
    return seen.events(tensors(results))


class _Allocations(DispatchMode):
    """The storages that are born while it is entered, in order, and when they die."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors(list(arguments))}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._events: list[Event] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "peftdyno":
            with self:
                return triton.load(func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self._meet(tensor)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not tensor.is_meta or key in self._known or key in self._alive:
            return
        number = len(self._events)
        self._events.append(Event(number, storage.nbytes()))
        self._alive[key] = number, weakref.ref(storage, lambda _: self._lose(key, number))

    def _lose(self, key: int, number: int) -> None:
        del self._alive[key]
        self._events.append(Event(number, None))

    def events(self, results: Sequence[Tensor]) -> tuple[Event, ...]:
        """All but those of tables that are kept for later calls, which live on without being results. A result that
        lies in the storage of another adds nothing."""
        places: dict[int, int] = {}
        shared = []
        for place, tensor in enumerate(results):
            alive = self._alive.get(tensor.untyped_storage()._cdata)
            if alive is not None and places.setdefault(alive[0], place) != place:
                shared.append(Event(-1, 0, place))
        tables = {number for number, _ in self._alive.values()} - set(places)
        kept = [event for event in self._events if event.storage not in tables]
        return (*(replace(event, result=places.get(event.storage, -1)) for event in kept), *shared)


@contextmanager
def no_launches() -> Iterator[None]:
    """Within it, kernels of Triton are not launched."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    launch, interpret = JITFunction.run, GridExecutor.__call__
    JITFunction.run = GridExecutor.__call__ = lambda *args, **options: None
    try:
        yield
    finally:
        JITFunction.run, GridExecutor.__call__ = launch, interpret
