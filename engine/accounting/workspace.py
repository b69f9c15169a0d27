"""Workspace: bytes that an operator holds during a call beside its arguments and results, as it runs on a device.

A cost formula states the workspace of the plain definition; the compiled CPU kernels say themselves what they hold, and
the code that launches Triton kernels is asked, where Triton is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.gpu_scratch import Event, TritonScratch
from peftdyno.engine.accounting.library_scratch import MATMULS, product_scratch
from peftdyno.kernels import dispatch, triton
from peftdyno.kernels.library import COSTS, PRIMITIVES
from peftdyno.kernels.workspace import cpu_workspace, label_loss_rows, own_product


def not_asked(device: str) -> str | None:
    """What keeps a device's workspaces from being exact, in a sentence; None where they are."""
    if device != "cuda" or triton.installed() or dispatch.current() == "reference":
        return None
    return "Triton is not installed: the scratch of its kernels is taken from their plain definitions"


class Workspaces:
    """What calls hold as they run on a device of type `device`.

    With `probe` the scratch of the CPU's matrix library is included, which is measured on this machine.
    """

    def __init__(self, device: str, *, probe: bool = False) -> None:
        self.device = torch.device(device)
        self.probe = probe
        self._triton = TritonScratch()

    def events(self, namespace: str, operator: str, arguments: Sequence[Any]) -> tuple[Event, ...] | None:
        """What a call allocates and frees, its results too; None where `of` says it in one figure."""
        if namespace == "aten" or not triton.serves(operator, self.device) or not triton.installed():
            return None
        return self._triton.of(operator, arguments)

    def of(self, namespace: str, operator: str, arguments: Sequence[Any]) -> int:
        """Bytes of one call."""
        if namespace == "aten":
            return self._product(operator, arguments)
        if self.device.type == "cpu" and _kind(operator) == "cpu":
            return _compiled(operator, arguments, _library(operator, arguments) if self.probe else 0)
        owned = COSTS[operator](*arguments)
        return max(owned.base.workspace, owned.adapter.workspace)

    def _product(self, operator: str, arguments: Sequence[Any]) -> int:
        place = MATMULS.get(operator)
        if place is None or self.device.type != "cpu" or not self.probe:
            return 0
        return product_scratch(*arguments[place : place + 2])


def _kind(operator: str) -> str:
    return dispatch.choose(operator, PRIMITIVES[operator].implementations, torch.device("cpu"))


def _compiled(operator: str, arguments: Sequence[Any], library: int) -> int:
    held = cpu_workspace(operator, arguments)
    return max(held.during_products + library, held.otherwise, 0)


def _library(operator: str, arguments: Sequence[Any]) -> int:
    """Scratch of the largest library product inside a compiled operator."""
    if operator in ("linear", "lora_linear"):
        return _scratch(arguments[0], arguments[1].t())
    if operator == "linear_backward":
        return _scratch(arguments[0], arguments[1])
    if operator == "lora_linear_backward":
        return _scratch(arguments[0], arguments[3]) if arguments[-1] else 0
    if operator == "label_loss":
        x, head = arguments[0][: label_loss_rows()], arguments[1]
        logits = x.new_empty(x.shape[0], head.shape[0], device="meta")
        back = _scratch(logits, head) if arguments[4] else 0
        return max(_scratch(x, head.t()), back)
    return 0


def _scratch(left: Tensor, right: Tensor) -> int:
    own = own_product(left, right.shape[1])
    return product_scratch(left, right) if own is None else 0
