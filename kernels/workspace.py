"""What the compiled CPU kernels hold during a call beside its arguments and results, as they themselves compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu


@dataclass(frozen=True)
class Workspace:
    """Bytes held while the matrix library runs inside the operator, and at most at any other moment.

    Both count beside results that are all there; where one is made later than that moment, its bytes are subtracted.
    """

    during_products: int = 0
    otherwise: int = 0


def cpu_workspace(operator: str, arguments: Sequence[Any]) -> Workspace:
    """Workspace of one call of a compiled operator; its tensors may be on the meta device, tables of segments not."""
    formula = _FORMULAS.get(operator)
    return Workspace() if formula is None else formula(*arguments)


def label_loss_rows() -> int:
    """Rows whose logits the compiled operator holds at once."""
    rows: int = torch.ops.peftdyno_cpu.label_loss_chunk()
    return rows


def own_product(left: Tensor, columns: int) -> int | None:
    """Bytes that a large product of the compiled kernels holds; None where the matrix library multiplies.

    left: [rows, depth]. Of weights that are not kept as panels, as in training.
    """
    shape = left.shape[0], left.shape[1], columns, left.dtype == torch.bfloat16
    held: int = torch.ops.peftdyno_cpu.product_workspace(*shape)
    return None if held < 0 else held


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Workspace:
    return Workspace(otherwise=own_product(x, weight.shape[0]) or 0)


def _linear_backward(dy: Tensor, weight: Tensor) -> Workspace:
    return Workspace(otherwise=own_product(dy, weight.shape[1]) or 0)


def _label_loss(x: Tensor, head: Tensor, targets: Tensor, softcap: float, need_gradient: bool) -> Workspace:
    rows = min(x.shape[0], label_loss_rows())
    logits = x.new_empty(rows, head.shape[0], device="meta")
    held = rows * torch.ops.peftdyno_cpu.label_loss_stride(head.shape[0], x.element_size()) * x.element_size()
    forward = own_product(x[:rows], head.shape[0])
    backward = own_product(logits, x.shape[1]) if need_gradient else None
    return Workspace(during_products=held, otherwise=held + max(forward or 0, backward or 0))


def _attention(q: Tensor, k: Tensor, segments: Tensor, chain: Tensor, window: int, backward: bool) -> Workspace:
    shape = q.shape[1], k.shape[1], q.shape[2], window, q.dtype == torch.bfloat16, backward
    return Workspace(otherwise=torch.ops.peftdyno_cpu.attention_workspace(segments, chain, *shape))


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, *rest: Any) -> Workspace:
    return _attention(q, k, rest[0], rest[1], rest[3], False)


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Workspace:
    return _attention(q, k, rest[4], rest[5], rest[7], True)


def attention_gradient_bytes(segments: Tensor, chain: Tensor, heads: int, key_heads: int, width: int) -> int:
    """What the gradient of attention holds in fp32, without a window; 0 without the compiled kernels."""
    if not cpu.AVAILABLE:
        return 0
    held: int = torch.ops.peftdyno_cpu.attention_workspace(segments, chain, heads, key_heads, width, 0, False, True)
    return held


def _lora(x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any) -> Workspace:
    _, rows, runs, *_ = rest
    terms = weight.shape[0], x.shape[1], _ranks(a), rows, runs, x.dtype == torch.bfloat16
    return Workspace(otherwise=torch.ops.peftdyno_cpu.lora_workspace(*terms))


def _lora_backward(
    dy: Tensor, x: Tensor, u: Tensor, weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], *rest: Any
) -> Workspace:
    _, rows, runs, dropout, *_, need_x = rest
    terms = weight.shape[0], x.shape[1], _ranks(a), rows, runs, x.dtype == torch.bfloat16, dropout > 0, need_x
    return Workspace(otherwise=torch.ops.peftdyno_cpu.lora_backward_workspace(*terms))


def _ranks(a: Sequence[Tensor]) -> list[int]:
    return [factor.shape[1] for factor in a]


def _row_sums(values: int) -> Workspace:
    """Two fp32 sums of so many values for each thread (RowSums in csrc/cpu/tensors.h)."""
    return Workspace(otherwise=torch.get_num_threads() * 2 * 4 * values)


def _rms_norm_backward(dy: Tensor, dh: Any, h: Tensor, weight: Tensor, *rest: Any) -> Workspace:
    return _row_sums(weight.numel() if rest[-1] else 0)


def _glu_backward(dy: Tensor, gate_up: Tensor, scale: Tensor | None, *_: Any) -> Workspace:
    return _row_sums(0 if scale is None else scale.numel())


def _column_sums(dy: Tensor, before: Any, column: int, width: int, run_offsets: Sequence[int]) -> Workspace:
    return _row_sums(width * (len(run_offsets) - 1))


_FORMULAS: dict[str, Callable[..., Workspace]] = (
    {
        "linear": _linear,
        "linear_backward": _linear_backward,
        "label_loss": _label_loss,
        "attention": _attention_forward,
        "attention_backward": _attention_backward,
        "lora_linear": _lora,
        "lora_linear_backward": _lora_backward,
        "rms_norm_backward": _rms_norm_backward,
        "glu_backward": _glu_backward,
        "bank_column_sums": _column_sums,
    }
    if cpu.AVAILABLE
    else {}
)
