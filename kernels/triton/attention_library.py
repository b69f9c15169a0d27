"""Attention over packs without parents by a library: PyTorch's own flash attention, or flash-attn where it is there.

Both take sequences that lie one behind another (Dao 2023). They serve where every query sees its own sequence alone and
nothing caps the scores; the log-sums they give and take are those of our kernels, so one direction may be a library's
and the other ours. Their backward pass is asked for its deterministic form.
cu: int32 [S + 1], first rows of the sequences and the number of rows.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftdyno.kernels import replay, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.attention_tables import planned
from peftdyno.kernels.triton.row_chunks import upload


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a pack lie, and the number of rows of the longest."""

    cu: Tensor
    longest: int


@dataclass(frozen=True)
class Call:
    """A library's form and what every call of it takes."""

    form: str
    sequences: Sequences
    scale: float
    left: int
    """Keys seen before a query's own, -1 for all."""


def runnable(operator: str, device: torch.device) -> tuple[str, ...]:
    """The forms of an attention operator that there is a library for, ours included."""
    if device.type != "cuda":
        return tuning.FORMS[operator][:1]
    return tuple(form for form in tuning.FORMS[operator] if form != "flash-attn" or _flash_attn())


@functools.cache
def _flash_attn() -> bool:
    """Whether flash-attn is there, in a version that gives log-sums as [H, N]."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    major, minor = version("flash_attn").split(".")[:2]
    return (int(major), int(minor)) >= (2, 6)


def chosen(
    operator: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    prefix: Tensor | None,
    tables: tuple[Tensor, Tensor],
    options: tuple[float, int, float],
) -> Call | None:
    """The library's call that stands for an operator on q, k, v, or None where our kernels run: the default, and
    wherever the pack or the operands do not allow another form."""
    (q, k, v), (segments, chain), (scale, window, softcap) = tensors, tables, options
    if prefix is not None or softcap or replay.active() is not None or not _addressable(q, k, v):
        return None
    found = planned(segments, ("sequences", q.device), lambda: _sequences(segments, chain, q.shape[0], q.device))
    if found is None:
        return None
    (n, heads, d), longest = q.shape, 1 << (found.longest - 1).bit_length()
    form = tuning.form(operator, (n, heads, k.shape[1], d, longest, window), q.device)
    if form == "own" or form not in runnable(operator, q.device):
        return None
    return Call(form, found, scale, window - 1 if window else -1)


def _addressable(*tensors: Tensor) -> bool:
    """16-bit heads of whole groups of eight up to 256, each at a multiple of 16 bytes; queries of the keys' rows."""
    return tensors[0].shape[0] == tensors[1].shape[0] and all(
        t.dtype in (torch.float16, torch.bfloat16)
        and t.shape[2] % 8 == 0
        and t.shape[2] <= 256
        and t.stride(2) == 1
        and t.stride(0) % 8 == t.stride(1) % 8 == 0
        and t.storage_offset() % 8 == 0
        for t in tensors
    )


def _sequences(segments: Tensor, chain: Tensor, rows: int, device: torch.device) -> Sequences | None:
    """None unless the segments see themselves alone and follow each other through all rows."""
    table, links = segments.numpy(), chain.numpy()
    if not len(table) or not rows:
        return None
    own, ends = links[table[:, 3] - 1], table[:, 0] + table[:, 1]
    alone = (table[:, 3] - table[:, 2] == 1) & (own[:, :2] == table[:, :2]).all(axis=1)
    cu = np.concatenate([[0], ends]).astype(np.int32)
    if not alone.all() or (cu[:-1] != table[:, 0]).any() or cu[-1] != rows:
        return None
    return Sequences(upload(cu, device), int(table[:, 1].max()))


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    """out [N, H d] with `spare` columns free to the right of each row, and lse [H, N]."""
    run = flash_attn_forward if call.form == "flash-attn" else torch_forward
    out, lse = run(call, q, k, v)
    flat = out.flatten(1)
    return (with_spare(flat.shape[0], flat.shape[1], spare, q).copy_(flat) if spare else flat), lse


def backward(
    call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spare: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the fused qkv rows [N, (H + 2K) d]; those of a prefix are empty."""
    (n, heads, d), key_heads = q.shape, k.shape[1]
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    gradients = torch_backward(call, dout.unflatten(1, (heads, d)), out.unflatten(1, (heads, d)), q, k, v, lse)
    dqkv = with_spare(n, (heads + 2 * key_heads) * d, spare, q)
    for part, gradient in zip(dqkv.split([heads * d, key_heads * d, key_heads * d], dim=1), gradients, strict=True):
        part.copy_(gradient.flatten(1))
    dprefix = [q.new_zeros(0, key_heads, d, dtype=torch.float32) for _ in range(2)]
    return dqkv, dprefix[0], dprefix[1]


def torch_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [N, H, d] and lse by the operator under torch.nn.attention.varlen, which knows grouped queries."""
    cu, longest = call.sequences.cu, call.sequences.longest
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, call.left < 0, False, scale=call.scale, **_window(call)
    )
    return out, lse


def torch_backward(
    call: Call, dout: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the same library; without dropout it reads no random state."""
    cu, longest = call.sequences.cu, call.sequences.longest
    state, unused = (torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0))
    with _deterministic():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, call.left < 0, state, unused,
            scale=call.scale, **_window(call),
        )  # fmt: skip
    return dq, dk, dv


def flash_attn_forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [N, H, d] and lse by flash-attn."""
    cu, longest = call.sequences.cu, call.sequences.longest
    window = (call.left, 0) if call.left >= 0 else (-1, -1)
    out, lse, _ = importlib.import_module("flash_attn").flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, softmax_scale=call.scale, causal=True, window_size=window,
        return_attn_probs=True,
    )  # fmt: skip
    return out, lse


def _window(call: Call) -> dict[str, Any]:
    return {} if call.left < 0 else {"window_size_left": call.left, "window_size_right": 0}


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch chooses the library's deterministic form by a switch of the process, which also fills new memory unless
    told otherwise."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        memory.fill_uninitialized_memory = fill
