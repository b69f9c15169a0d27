"""What else computes attention over packs without parents: PyTorch's fused attention where all sequences are of one
length, the flash attention beneath it for any lengths, and flash-attn where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu.cases import Case
from peftdyno.bench.gpu.timing import median_ms

Sets = list[tuple[Any, ...]]


def available(name: str, device: torch.device) -> bool:
    """Whether an alternative runs on a device; only PyTorch's attention over equal sequences does without a GPU."""
    if name == "sdpa":
        return True
    return device.type == "cuda" and (name != "flash" or importlib.util.find_spec("flash_attn") is not None)


def milliseconds(name: str, case: Case, sets: Sets, device: torch.device) -> float:
    """Time of an alternative, one of `FORMS`."""
    backward, make = case.operator == "attention_backward", FORMS[name]
    return median_ms([make(*_parts(arguments, backward), backward) for arguments in sets], device)


def _parts(arguments: tuple[Any, ...], backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the table of segments."""
    q, k, v = arguments[int(backward) : int(backward) + 3]
    return q, k, v, arguments[8 if backward else 5]


def _call(
    attend: Callable[..., Tensor], operands: list[Tensor], backward: bool, **options: Any
) -> Callable[[], tuple[Tensor, ...]]:
    """The forward pass, or with `backward` the gradients alone."""
    if not backward:
        return lambda: (attend(*operands, **options),)
    operands = [t.requires_grad_() for t in operands]
    out = attend(*operands, **options)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, operands, dout, retain_graph=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    heads = [t.unflatten(0, (len(segments), -1)).transpose(1, 2).contiguous() for t in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return _call(attend, heads, backward, is_causal=True, enable_gqa=True)


def _offsets(segments: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """First rows of the sequences and the number of rows, and the longest sequence."""
    lengths = segments[:, 1]
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = lengths.cumsum(0)
    return cu.to(device), int(lengths.max())


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    cu, longest = _offsets(segments, q.device)
    heads = [t.contiguous() for t in (q, k, v)]
    return _call(lambda *t: _flash_of_torch(*t, cu, longest), heads, backward)


def _flash_of_torch(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
    out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, longest, longest, 0.0, True, False)[0]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    cu, longest = _offsets(segments, q.device)
    attend = importlib.import_module("flash_attn").flash_attn_varlen_func
    heads = [t.contiguous() for t in (q, k, v)]
    return _call(lambda *t: attend(*t, cu, cu, longest, longest, causal=True), heads, backward)


FORMS = {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash}
"""Alternative -> what makes its call from q, k, v, the table of segments and the direction."""
