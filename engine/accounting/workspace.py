"""Workspace: bytes that an implementation of an operator holds during a call beside its arguments and results.

A cost formula states the workspace of the plain definition; the compiled CPU kernels differ, and are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.library_scratch import MATMULS, product_scratch
from peftdyno.kernels import cpu, dispatch
from peftdyno.kernels.label_loss import CHUNK_ROWS
from peftdyno.kernels.library import COSTS, PRIMITIVES, row_bytes

KEY_BLOCK, TASK_ROWS, LORA_ROWS, LORA_STRIP = 64, 96, 64, 128
"""Keys of a block, query rows of a task, tokens of a block and columns of a strip in the CPU kernels."""
KEY_ROWS = COLUMNS = RANKS = 32
"""What keys and rows, columns, and ranks are padded to there."""


def workspace(namespace: str, operator: str, arguments: Sequence[Any], device: str, *, probe: bool = False) -> int:
    """Bytes of one call of an operator as it runs on a device of type `device`.

    With `probe` the scratch of the CPU's matrix library is included, which is measured on this machine.
    """
    if namespace == "aten":
        place = MATMULS.get(operator)
        return 0 if place is None or device != "cpu" or not probe else product_scratch(*arguments[place : place + 2])
    implementations = PRIMITIVES[operator].implementations
    if device == "cpu" and dispatch.choose(operator, implementations, torch.device("cpu")) == "cpu":
        library = _library(operator, arguments) if probe else 0
        if operator == "label_loss":
            return _label_loss(*arguments) + library
        if operator == "lora_linear_backward":
            return _lora_backward(*arguments, library=library)
        return max(library, _CPU[operator](*arguments) if operator in _CPU else 0)
    owned = COSTS[operator](*arguments)
    return max(owned.base.workspace, owned.adapter.workspace)


def _library(operator: str, arguments: Sequence[Any]) -> int:
    """Scratch of the largest library product inside a compiled operator."""
    if operator in ("linear", "lora_linear"):
        return product_scratch(arguments[0], arguments[1].t())
    if operator == "linear_backward":
        return product_scratch(arguments[0], arguments[1])
    if operator == "lora_linear_backward":
        return product_scratch(arguments[0], arguments[3])
    if operator == "label_loss":
        x, head = arguments[0][:CHUNK_ROWS], arguments[1]
        logits = x.new_empty(x.shape[0], head.shape[0], device="meta")
        back = product_scratch(logits, head) if arguments[4] else 0
        return max(product_scratch(x, head.t()), back)
    return 0


def _padded(n: int, block: int) -> int:
    return -(-n // block) * block


def _label_loss(x: Tensor, head: Tensor, *_: Any) -> int:
    """The logits of one chunk of rows; the softmax is formed in their place."""
    return min(x.shape[0], CHUNK_ROWS) * head.shape[0] * x.element_size()


def _operand_bytes(dtype: torch.dtype) -> int:
    """Bytes of an element of a packed operand: fp32 unless the processor multiplies tiles of bf16."""
    return 2 if dtype == torch.bfloat16 and cpu.instruction_set() == "amx" else 4


def _packed_keys(k: Tensor, segments: Tensor, chain: Tensor, groups: int) -> tuple[int, int, int]:
    """(elements of one packed operand, rows of the largest task, threads that have a task)."""
    ranges = {(row, count) for row, count, _ in chain.tolist()}
    keys = sum(_padded(count, KEY_ROWS) for _, count in ranges)
    queries = max(1, TASK_ROWS // groups)
    counts = [count for _, count, _, _ in segments.tolist()]
    rows = _padded(min(queries, max(counts, default=0)) * groups, KEY_ROWS)
    tasks = k.shape[1] * sum(-(-count // queries) for count in counts)
    return k.shape[1] * keys * _padded(k.shape[2], COLUMNS), rows, max(1, min(torch.get_num_threads(), tasks))


def _attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, *rest: Any) -> int:
    """Keys and values packed, and each thread's scores and outputs of a task."""
    elements, rows, threads = _packed_keys(k, rest[0], rest[1], q.shape[1] // k.shape[1])
    scratch = rows * (_padded(k.shape[2], COLUMNS) + KEY_BLOCK) * 8 + rows * 8 + 6 * 64
    return 2 * elements * _operand_bytes(q.dtype) + threads * _padded(scratch, 64)


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, *rest: Any) -> int:
    """Keys packed twice and values once, their gradients in fp32, and each thread's share of a task."""
    elements, rows, threads = _packed_keys(k, rest[2], rest[3], q.shape[1] // k.shape[1])
    scratch = rows * (5 * _padded(k.shape[2], COLUMNS) + 5 * KEY_BLOCK + 2) * 4 + 12 * 64
    return elements * (3 * _operand_bytes(q.dtype) + 2 * 4) + threads * _padded(scratch, 64)


def _sums(values: int) -> int:
    """Two fp32 sums of so many values for each thread."""
    return torch.get_num_threads() * 2 * 4 * values


def _rms_norm_backward(dy: Tensor, dh: Any, h: Tensor, weight: Tensor, *rest: Any) -> int:
    return _sums(weight.numel()) if rest[-1] else 0


def _glu_backward(dy: Tensor, gate_up: Tensor, scale: Tensor | None, *_: Any) -> int:
    return 0 if scale is None else _sums(scale.numel())


def _column_sums(dy: Tensor, before: Any, column: int, width: int, run_offsets: Sequence[int]) -> int:
    return _sums(width * (len(run_offsets) - 1))


def _low_rank_operands(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, int]:
    """Elements of all packed A and of all packed B."""
    sizes = [0, 0]
    for down, up in zip(a, b, strict=True):
        rank = _padded(down.shape[1], RANKS) * down.shape[0]
        sizes[0] += rank * _padded(down.shape[2], COLUMNS)
        sizes[1] += rank * _padded(up.shape[1], COLUMNS)
    return sizes[0], sizes[1]


def _lora_scratch(a: Sequence[Tensor], tokens: int) -> int:
    """What the threads hold while they work on blocks of tokens."""
    rank = max(_padded(down.shape[1], RANKS) for down in a)
    scratch = LORA_ROWS * (16 * rank + 10 * LORA_STRIP) + 64 * _padded(a[0].shape[2], LORA_STRIP) + 16 * 64
    return min(torch.get_num_threads(), -(-tokens // 32)) * _padded(scratch, 64)


def _lora(x: Tensor, weight: Tensor, bias: Any, a: Sequence[Tensor], b: Sequence[Tensor], *_: Any) -> int:
    """Both factors packed, and the threads' scratch."""
    return sum(_low_rank_operands(a, b)) * _operand_bytes(x.dtype) + _lora_scratch(a, x.shape[0])


def _lora_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *_: Any,
    library: int = 0,
) -> int:
    """Both factors packed, each thread's sums of their gradients in fp32, and the threads' scratch, which is gone when
    the library multiplies; the gradients themselves are made last, when only the sums are left."""
    threads = min(torch.get_num_threads(), -(-x.shape[0] // 32))
    elements = sum(_low_rank_operands(a, b))
    kept = elements * (_operand_bytes(x.dtype) + 4 * threads)
    return max(0, kept + max(library, _lora_scratch(a, x.shape[0])) - row_bytes(*a, *b))


_CPU: dict[str, Callable[..., int]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "rms_norm_backward": _rms_norm_backward,
    "glu_backward": _glu_backward,
    "bank_column_sums": _column_sums,
    "lora_linear": _lora,
}
