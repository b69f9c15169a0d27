"""The operator namespace `peftdyno`: each primitive is one torch operator that a dispatch mode sees and costs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftdyno.kernels import dispatch

LIBRARY = torch.library.Library("peftdyno", "DEF")


@dataclass(frozen=True)
class Cost:
    """What one call costs: `matrix` FLOPs (2 a multiply-add), `pointwise` and `reduction` FLOPs, `bytes` read
    and written at least, and `workspace` bytes held during the call beside its inputs and outputs."""

    matrix: int = 0
    pointwise: int = 0
    reduction: int = 0
    bytes: int = 0
    workspace: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.matrix + other.matrix,
            self.pointwise + other.pointwise,
            self.reduction + other.reduction,
            self.bytes + other.bytes,
            max(self.workspace, other.workspace),
        )


@dataclass(frozen=True)
class OwnedCost:
    """A call's cost, divided between the frozen base model and the adapter."""

    base: Cost = Cost()
    adapter: Cost = Cost()


CostFormula = Callable[..., OwnedCost]
"""Takes the operator's arguments (tensors may be on the meta device) and gives its cost."""

COSTS: dict[str, CostFormula] = {}
"""Operator name -> cost formula; the counting mode refuses a `peftdyno` operator that is not here."""


def watched() -> bool:
    """Whether a dispatch mode sees the operators that run now (one that counts, times or only finds shapes)."""
    return torch._C._len_torch_dispatch_stack() > 0


@dataclass(frozen=True)
class Primitive:
    """One operator: its name, its implementations by kind (`reference` always there), and torch's operator `call`.

    A call goes through torch's operator only where someone watches: twice through the dispatcher, it takes longer than
    the small kernels themselves.
    """

    name: str
    implementations: dict[str, Callable[..., Any]]
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        if watched() or args[0].is_meta:
            return self.call(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """The implementation that the device and the user's choice name."""
        return self.implementations[dispatch.choose(self.name, self.implementations, args[0].device)](*args)


PRIMITIVES: dict[str, Primitive] = {}


def every_primitive() -> dict[str, Primitive]:
    """All operators, also those whose modules nothing has imported yet."""
    from peftdyno import kernels

    for module in pkgutil.iter_modules(kernels.__path__, "peftdyno.kernels."):
        importlib.import_module(module.name)
    return PRIMITIVES


def primitive(
    schema: str,
    *,
    reference: Callable[..., Any],
    shape: Callable[..., Any],
    cost: CostFormula,
    **implementations: Callable[..., Any],
) -> Primitive:
    """Register an operator.

    `schema` is torch's (``name(Tensor x, ...) -> Tensor``). `reference` is plain PyTorch for any device; `shape`
    allocates the outputs only and serves the meta device; `cost` takes the same arguments. Further keywords name
    implementations (`cpu`, `triton`), each a callable with the same arguments.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    operator = getattr(torch.ops.peftdyno, name).default
    made = Primitive(name, {"reference": reference, **implementations}, operator)
    LIBRARY.impl(name, made.run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, shape, "Meta")
    COSTS[name], PRIMITIVES[name] = cost, made
    return made


def row_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of the tensors (views count what they show, absent ones nothing)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def with_spare(rows: int, columns: int, spare: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised [rows, columns] tensor with `spare` unused columns to the right of each row in memory."""
    return like.new_empty(rows, columns + spare)[:, :columns]
