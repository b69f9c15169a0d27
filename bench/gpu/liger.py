"""Liger-Kernel's form of an operator, where the package is installed, on operands laid out as it wants them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _norm(x: Tensor, residual: Tensor, weight: Tensor, _: Any, eps: float, *__: Any) -> Call:
    norm = _function("rms_norm", "LigerRMSNormFunction")
    return lambda: norm.apply(x + residual, weight, eps)


def _norm_backward(dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, *_: Any) -> Call:
    norm = _function("rms_norm", "LigerRMSNormFunction")
    out = norm.apply(h.requires_grad_(), weight, 1e-5)
    return lambda: torch.autograd.grad(out, h, dy, retain_graph=True)[0] + dh


def _halves(gate_up: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.contiguous() for t in gate_up.chunk(2, dim=1))


def _glu(gate_up: Tensor, *_: Any) -> Call:
    multiply, halves = _function("swiglu", "LigerSiLUMulFunction"), _halves(gate_up)
    return lambda: multiply.apply(*halves)


def _glu_backward(dy: Tensor, gate_up: Tensor, *_: Any) -> Call:
    halves = [t.requires_grad_() for t in _halves(gate_up)]
    out = _function("swiglu", "LigerSiLUMulFunction").apply(*halves)
    return lambda: torch.autograd.grad(out, halves, dy, retain_graph=True)


def _rotary(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, _: bool) -> Call:
    """A sequence of all rows; its kernel turns queries and keys as [1, S, H, d] in memory. It takes them in equal
    parts here: how they are divided changes nothing in what is read and written."""
    turn, width = _function("rope", "LigerRopeFunction"), 2 * cos.shape[1]
    heads = qkv[:, : num_heads * width].unflatten(1, (num_heads, width))
    q, k = (t.contiguous()[None].transpose(1, 2) for t in heads.chunk(2, dim=1))
    both = [torch.cat([t, t], dim=1)[None] for t in (cos, sin)]
    return lambda: turn.apply(q, k, *both)


def _label_loss(x: Tensor, head: Tensor, targets: Tensor, *_: Any) -> Call:
    loss = _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return lambda: loss.apply(x.requires_grad_(), head, targets)


FORMS = {
    "rms_norm": _norm,
    "rms_norm_backward": _norm_backward,
    "glu": _glu,
    "glu_backward": _glu_backward,
    "rotary_": _rotary,
    "label_loss": _label_loss,
}
"""Operator -> what makes Liger's call from our arguments."""
