"""Measure the tiles of every tuned kernel on this GPU and keep the fastest: what `peftdyno tune` runs.

Each kernel runs at the sizes given; a candidate replaces the shipped tile where its results stay right and it is
faster by more than the spread of repeated measurements. `tuning.save` writes what was found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton import attention, attention_backward, lora_gemm, skinny
from peftdyno.kernels.triton.low_rank import modules_of
from peftdyno.kernels.tuning import Tile

MARGIN = 1.02
"""A candidate must be faster by this factor."""


@dataclass(frozen=True, kw_only=True)
class TuneSizes:
    """Tokens, widths and heads to tune for; the defaults are those of an 8B model."""

    tokens: int = 8192
    width: int = 4096
    out: int = 4096
    rank: int = 16
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True)
class Subject:
    """A tuned kernel: its entry of `tuning.SHIPPED`, and a call whose results must not depend on the tile."""

    kernel: str
    call: Callable[[], Any]


def subjects(sizes: TuneSizes, device: torch.device) -> Iterator[Subject]:
    """Every tuned kernel on random data, in bf16."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

    def rows(n: int, columns: int) -> Tensor:
        return torch.randn(n, columns, device=device).to(dtype)

    x, runs = rows(sizes.tokens, sizes.width), (0, sizes.tokens)
    a = [torch.randn(1, sizes.rank, sizes.width, device=device)]
    modules = modules_of(a, (0, sizes.out), (1.0,))
    down, up, u = rows(sizes.rank, sizes.width), rows(sizes.out, sizes.rank), rows(sizes.tokens, sizes.rank)
    streams = torch.arange(sizes.tokens, device=device)
    dropout = skinny.Dropout(0.05, streams, torch.zeros(1, 1, dtype=torch.int64, device=device))
    weight = rows(sizes.out, sizes.width)
    project = lambda: skinny.project(x, down, modules, runs, None, of_b=False, dropout=dropout)  # noqa: E731
    yield Subject("lora_project", project)
    yield Subject("lora_outer", lambda: skinny.outer(u, x, modules, runs, of_b=False, dropout=dropout)[0])

    def add() -> Tensor:
        dx = x.clone()
        skinny.add_masked(dx, u, down, modules, runs, dropout)
        return dx

    yield Subject("lora_add", add)
    if lora_gemm.suitable(u, up):
        yield Subject("lora_gemm", lambda: lora_gemm.product(x, weight, u, up))
    yield from _attention(sizes, dtype, device)


def _attention(sizes: TuneSizes, dtype: torch.dtype, device: torch.device) -> Iterator[Subject]:
    n, heads, kv, d = sizes.tokens, sizes.heads, sizes.key_heads, sizes.head_dim
    qkv = torch.randn(n, heads + 2 * kv, d, device=device).to(dtype)
    q, k, v = qkv.split([heads, kv, kv], dim=1)
    half = n // 2
    segments = torch.tensor([[0, half, 0, 1], [half, n - half, 1, 2]], dtype=torch.int32)
    chain = torch.tensor([[0, half, 0], [half, n - half, 0]], dtype=torch.int32)
    options = (None, None, segments, chain, d**-0.5, 0, 0.0, 0)
    kind = attention.width_class(d)
    yield Subject(f"attention/{kind}", lambda: attention.forward(q, k, v, *options)[0])
    out, lse = attention.forward(q, k, v, *options)
    dout = with_spare(n, heads * d, 0, out).copy_(torch.randn(n, heads * d, device=device))
    backward = lambda: attention_backward.backward(dout, q, k, v, None, None, out, lse, *options[2:])[0]  # noqa: E731
    yield Subject(f"attention_dq/{kind}", backward)
    yield Subject(f"attention_dk/{kind}", backward)


def candidates(tile: Tile) -> list[Tile]:
    """The shipped tile and those with one or two of its sizes halved or doubled."""
    found = [tile]
    for rows in (tile.rows // 2, tile.rows, tile.rows * 2):
        for columns in (tile.columns // 2, tile.columns, tile.columns * 2):
            for warps in {4, 8, tile.warps}:
                for stages in {2, 3, 4, tile.stages}:
                    found.append(replace(tile, rows=rows, columns=columns, warps=warps, stages=stages))
    return [t for t in dict.fromkeys(found) if min(t.rows, t.columns) >= 16]


def tune(sizes: TuneSizes, device: torch.device, only: str = "") -> dict[str, dict[str, Any]]:
    """Fastest tile of each kernel whose name contains `only`: {kernel: {tile, ms, shipped_ms}}, for `tuning.save`."""
    found: dict[str, dict[str, Any]] = {}
    for subject in subjects(sizes, device):
        if only in subject.kernel:
            found[subject.kernel] = _fastest(subject, device)
    return found


def _fastest(subject: Subject, device: torch.device) -> dict[str, Any]:
    shipped = tuning.SHIPPED[subject.kernel][tuning.architecture(device)]
    with tuning.trial(subject.kernel, shipped):
        truth = subject.call()
        baseline = milliseconds(subject.call, device)
    best, best_ms = shipped, baseline
    for tile in candidates(shipped)[1:]:
        with tuning.trial(subject.kernel, tile):
            ms = _trial(subject, truth, device)
        if ms is not None and ms * MARGIN < best_ms:
            best, best_ms = tile, ms
    return {"tile": best, "ms": best_ms, "shipped_ms": baseline}


def _trial(subject: Subject, truth: Tensor, device: torch.device) -> float | None:
    """Milliseconds with the tile in force, or None where it does not fit or its results differ."""
    try:
        result = subject.call()
    except OutOfResources:
        return None
    gap = float((result.float() - truth.float()).norm() / truth.float().norm())
    return milliseconds(subject.call, device) if gap < 2 * torch.finfo(result.dtype).eps else None


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call on the device."""
    if device.type != "cuda":
        raise ValueError("tiles are tuned on a CUDA device; this machine has none")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(5_000_000)
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    median: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
    return median
