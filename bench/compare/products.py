"""Where our step's time goes by operator, and how its matrix products stand to this machine's ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from peftdyno.bench.compare.ours_steps import OurSteps
from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.kernels.library import COSTS

Shape = tuple[int, int, int]
"""Rows M, inner K and columns N of a product [M, K] x [K, N]."""
CEILING_TRIES = 3
CEILING_SECONDS = 0.02
"""How long one try of a ceiling at least runs, so that the clock's steps do not show."""


@dataclass
class Operator:
    """What one operator took in a step. `shapes` counts the FLOPs of its calls by shape."""

    seconds: float = 0.0
    calls: int = 0
    product_flops: int = 0
    shapes: dict[Shape, int] = field(default_factory=dict)


class OperatorClock(DispatchMode):
    """Seconds and matrix FLOPs of every operator called within; what an operator calls itself belongs to it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.clock = clock
        self.operators: dict[str, Operator] = {}

    def shapes(self) -> set[Shape]:
        """Shapes of all products seen."""
        return {shape for operator in self.operators.values() for shape in operator.shapes}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self.clock()
        result = func(*args, **(kwargs or {}))
        seconds = self.clock() - start
        operator = self.operators.setdefault(func.name().split(".")[0], Operator())
        operator.seconds += seconds
        operator.calls += 1
        product = product_of(func, args, kwargs or {}, result)
        if product is not None:
            shape, flops = product
            operator.product_flops += flops
            operator.shapes[shape] = operator.shapes.get(shape, 0) + flops
        return result


def product_of(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> tuple[Shape, int] | None:
    """Shape of the frozen product in a call and all its matrix FLOPs; None for what is no product with a weight
    (attention among it: its speed is its own matter)."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if func.namespace == "peftdyno":
        weight = given.get("weight", given.get("head"))
        if weight is None or weight.dim() != 2:
            return None
        name = func.name().removeprefix("peftdyno::").split(".")[0]
        cost = COSTS[name](*args, **kwargs)
        flops = cost.base.matrix + cost.adapter.matrix
        out, columns = weight.shape
        forward = "dy" not in given
        return ((args[0].shape[0], columns, out) if forward else (args[0].shape[0], out, columns)), flops
    if func._overloadpacket in flop_registry and func.name().split(".")[0] in ("aten::mm", "aten::addmm", "aten::bmm"):
        a, b = [x for x in args if isinstance(x, Tensor) and x.dim() >= 2][-2:]
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return (a.shape[-2] * (a.shape[0] if a.dim() == 3 else 1), a.shape[-1], b.shape[-1]), flops
    return None


def ceiling(shape: Shape, dtype: torch.dtype = torch.bfloat16, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of PyTorch's own product at a shape: the best of several tries, the second factor as it lies in memory
    or transposed."""
    m, k, n = shape
    a = torch.randn(m, k).to(dtype)
    best = 0.0
    for b in (torch.randn(k, n).to(dtype), torch.randn(n, k).to(dtype).t()):
        torch.mm(a, b)
        for _ in range(CEILING_TRIES):
            count, elapsed, start = 0, 0.0, clock()
            while elapsed < CEILING_SECONDS:
                torch.mm(a, b)
                count, elapsed = count + 1, clock() - start
            best = max(best, 2 * m * k * n * count / elapsed)
    return best


@dataclass
class Products(OurSteps):
    """Our training step with a clock around every operator."""

    def profile(self, steps: int) -> list[dict[str, Any]]:
        """Rounds of a plain step, one with a clock around operators, and the ceilings of its products, for the
        machine's speed changes from one to the next. Of each: seconds of the plain step, and by operator seconds,
        calls, FLOPs of products and the seconds that those would take at the ceiling for the same shapes."""
        self.take_step()
        return [self._round() for _ in range(steps)]

    def _round(self) -> dict[str, Any]:
        plain, clock = self.measure(1)["seconds"], self._clocked()
        ceilings = {shape: ceiling(shape) for shape in clock.shapes()}
        operators = {
            name: {
                "seconds": operator.seconds,
                "calls": operator.calls,
                "product_flops": operator.product_flops,
                "ceiling_seconds": sum(flops / ceilings[shape] for shape, flops in operator.shapes.items()),
            }
            for name, operator in clock.operators.items()
        }
        return {"step_seconds": plain, "operators": operators}

    def _clocked(self) -> OperatorClock:
        with OperatorClock() as clock:
            self.take_step()
        return clock
