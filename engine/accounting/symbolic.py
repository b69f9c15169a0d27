"""Runs the program itself on shapes alone: tensors of the meta device, nothing computed, nothing allocated.

Only what crosses between the meta device and the CPU needs an answer: values that the program reads back are zeros.
A copy between the two counts only where the predicted device is not the CPU, for there it does not happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.counting import Counter
from peftdyno.engine.accounting.library_scratch import MATMULS
from peftdyno.engine.accounting.quick_shapes import quick_shape
from peftdyno.engine.accounting.scope import Scope
from peftdyno.kernels import dispatch


class SymbolicCounter(Counter):
    """Counts a program that runs on the meta device as it would run on a device of type `device`."""

    def __init__(self, scope: Scope, device: str = "cpu") -> None:
        super().__init__(scope)
        self.device = device
        self._standing: list[Any] = []

    def __enter__(self) -> Any:
        self._standing.append(dispatch.shapes_of(torch.device(self.device)))
        self._standing[-1].__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)  # type: ignore[no-untyped-call]
        self._standing.pop().__exit__(*reason)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            read = _read_back(args[0], kwargs or {})
            if read is not None:
                return read
        if func._opname in MATMULS and torch._C._len_torch_dispatch_stack():
            return super().__torch_dispatch__(func, types, args, kwargs)  # what follows memory must see it by its name
        result = quick_shape(func, args, kwargs or {})
        if result is not None:
            self.charge(func, args, result)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)


def _read_back(source: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """Zeros where a copy leaves the meta device, else None."""
    device = torch.device(options.get("device") or source.device)
    if device.type == "meta":
        return None
    return torch.zeros(source.shape, dtype=options.get("dtype") or source.dtype, device=device)
