"""CUDA graphs of the device: what runs while one is recorded runs again, on the same memory and with the same numbers.

What a GPU refuses while it records is refused: values read back, copies between host and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")
replays = 0
_under_way: list[_Recording] = []


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recording(TorchDispatchMode):
    """Notes what runs while it is entered, in order, and keeps what it made alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func.namespace == "peftdyno":
            from peftdyno.kernels.library import PRIMITIVES

            with self:
                return PRIMITIVES[func._opname].run(*args)
        result = func(*args, **options)
        given, found = _tensors((args, options)), _tensors(result)
        if any(tensor.is_cuda for tensor in given + found):
            _refuse(func, given + found)
            self.made += found
            self._note(func, args, options, found, {tensor.untyped_storage()._cdata for tensor in given})
        return result

    def _note(self, func: Any, args: Any, options: Any, found: list[Tensor], known: set[int]) -> None:
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **options))
        elif not func._opname.startswith(("empty", "new_empty")) and any(
            tensor.untyped_storage()._cdata not in known for tensor in found
        ):
            self.calls.append(lambda: _write(found, func(*args, **options)))


def _refuse(func: Any, tensors: Sequence[Tensor]) -> None:
    if func._opname in READS:
        raise RuntimeError(f"operation not permitted while a stream is recorded: {func}")
    if func._opname in ("_to_copy", "copy_") and any(tensor.dim() and not tensor.is_cuda for tensor in tensors):
        raise RuntimeError(f"a copy between host and device while a stream is recorded: {func}")


def _write(targets: Sequence[Tensor], result: Any) -> None:
    for target, value in zip(targets, _tensors(result), strict=True):
        target.copy_(value)


class _Graph:
    def __init__(self) -> None:
        self.recording: _Recording

    @torch.no_grad()
    def replay(self) -> None:
        global replays
        replays += 1
        for call in self.recording.calls:
            call()


@contextmanager
def _record(graph: _Graph, **_: Any) -> Iterator[None]:
    graph.recording = _Recording()
    _under_way.append(graph.recording)
    try:
        with graph.recording:
            yield
    finally:
        _under_way.pop()


def install() -> None:
    """Replace CUDA's graphs, and note kernels that are launched while one is recorded."""
    from triton.runtime.interpreter import GridExecutor

    torch.cuda.CUDAGraph, torch.cuda.graph = _Graph, _record
    launch = GridExecutor.__call__

    def noted(executor: GridExecutor, *args: Any, **options: Any) -> None:
        if _under_way:
            _under_way[-1].calls.append(lambda: launch(executor, *args, **options))
        launch(executor, *args, **options)

    GridExecutor.__call__ = noted
