"""Workspace: bytes that an operator holds during a call beside its arguments and results, as it runs on a device.

A cost formula states the workspace of the plain definition; the compiled CPU kernels say themselves what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.library_scratch import MATMULS, product_scratch
from peftdyno.kernels import dispatch
from peftdyno.kernels.library import COSTS, PRIMITIVES
from peftdyno.kernels.workspace import cpu_workspace, label_loss_rows, own_product


def workspace(namespace: str, operator: str, arguments: Sequence[Any], device: str, *, probe: bool = False) -> int:
    """Bytes of one call of an operator as it runs on a device of type `device`.

    With `probe` the scratch of the CPU's matrix library is included, which is measured on this machine.
    """
    if namespace == "aten":
        place = MATMULS.get(operator)
        return 0 if place is None or device != "cpu" or not probe else product_scratch(*arguments[place : place + 2])
    implementations = PRIMITIVES[operator].implementations
    if device == "cpu" and dispatch.choose(operator, implementations, torch.device("cpu")) == "cpu":
        return _compiled(operator, arguments, _library(operator, arguments) if probe else 0)
    owned = COSTS[operator](*arguments)
    return max(owned.base.workspace, owned.adapter.workspace)


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
