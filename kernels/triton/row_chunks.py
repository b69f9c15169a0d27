"""Rows of a pack in chunks that never cross a run, and sums over a run's chunks in a fixed order.

Every kernel whose parameters depend on the run takes one chunk a program. Reductions over tokens write one partial
sum a chunk and add a run's partials in a second launch: the same bits every time, without atomics.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import replay
from peftdyno.kernels.transfer import sent
from peftdyno.kernels.triton.compiled import Compiled, Limits


@dataclass(frozen=True)
class RowChunks:
    """table [count, 3] of int32: first row, last row plus one, run. Run j owns chunks first[j]:first[j + 1]."""

    table: Tensor
    first: Tensor
    count: int


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy of an array on the device."""
    return sent(torch.from_numpy(np.ascontiguousarray(array)), device)


@functools.lru_cache(maxsize=512)
def _chunks(offsets: tuple[int, ...], rows: int, device: torch.device) -> RowChunks:
    pieces, first = [np.empty((0, 3), np.int32)], [0]
    for run, (start, stop) in enumerate(itertools.pairwise(offsets)):
        starts = np.arange(start, stop, rows, dtype=np.int32)
        pieces.append(np.stack([starts, np.minimum(starts + rows, stop), np.full_like(starts, run)], axis=1))
        first.append(first[-1] + len(starts))
    table = np.concatenate(pieces).astype(np.int32)
    return RowChunks(upload(table, device), upload(np.array(first, np.int32), device), len(table))


def row_chunks(offsets: Sequence[int], rows: int, device: torch.device) -> RowChunks:
    """Chunks of at most `rows` rows of runs whose rows are offsets[j]:offsets[j + 1]; kept for the next layers."""
    return replay.keep(_chunks(tuple(offsets), rows, device))


@triton.jit
def _sum_chunks(partials, first, out, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    run = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start, stop = tl.load(first + run), tl.load(first + run + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for chunk in range(start, stop, ROWS):
        rows = chunk + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * width + columns
        total += tl.load(partials + at, mask=(rows < stop)[:, None] & inside, other=0.0)
    tl.store(out + run.to(tl.int64) * width + columns, tl.sum(total, axis=0), mask=inside)


def sum_chunks(partials: Tensor, chunks: RowChunks) -> Tensor:
    """[R, ...] sums in fp32 of partials [count, ...] over each run's chunks; zeros for an empty run."""
    runs, width = chunks.first.numel() - 1, partials[:1].numel() if partials.numel() else 0
    shape = (runs, *partials.shape[1:])
    if chunks.count == 0 or runs == 0:
        return partials.new_zeros(shape)
    out = partials.new_empty(shape)
    block = 128
    _sum_chunks[(triton.cdiv(width, block), runs)](partials, chunks.first, out, width, BLOCK=block, ROWS=8, num_warps=4)
    return out


COMPILED = [
    Compiled(
        "sum_chunks",
        _sum_chunks,
        {"partials": "*fp32", "first": "*i32", "out": "*fp32", "width": "i32"},
        {"BLOCK": 128, "ROWS": 8},
        limits=Limits(registers=64),
    )
]
