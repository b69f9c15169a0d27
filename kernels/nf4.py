"""Weights in 4 bits: quantisation by NormalFloat codes and one absolute maximum a block (Dettmers et al. 2023, QLoRA).

A block is 64 consecutive elements of W [out, in] in row order. Quantise: c_i is the entry of the codebook nearest to
w_i / absmax(block); dequantise: w_i = codebook[c_i] * absmax(block), formed in fp32 and rounded to the compute dtype.
Double quantisation (sec. 3) keeps absmax in 8 bits: its mean, and blocks of 256 of what differs from it.
codes: uint8 [out * in / 2], the first of two elements in the high half; absmax: fp32 [out * in / 64]. The layout is
that of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import cpu, triton
from peftdyno.kernels.library import Cost, OwnedCost, primitive, row_bytes

BLOCK = 64
"""Elements of a weight that share an absolute maximum."""
NESTED_BLOCK = 256
"""Absolute maxima that share one of the second level."""
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NF4: quantiles of the standard normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E)."""
COMPILED = (torch.bfloat16, torch.float32)
"""What the C++ kernels write."""
CHUNK = 1 << 15
"""Bytes of codes that the form without C++ looks up at a time, so that what it holds beside the result
stays in cache."""
QUANTISED = 1 << 20
"""Elements that are quantised at a time, so that no wide copy of a whole weight is needed."""


@cache
def codebook(device: torch.device) -> Tensor:
    """The 16 values on a device, in fp32."""
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


@cache
def _pairs() -> Tensor:
    """[256] the two fp32 values that a byte stands for, side by side in one 64-bit integer."""
    book = codebook(torch.device("cpu"))
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1).view(torch.int64).flatten()


@cache
def dynamic_codes(device: torch.device) -> Tensor:
    """[256] ascending values of the signed dynamic 8-bit type (Dettmers 2016, sec. 2.2): +-10^-e times a fraction,
    with one bit more for the fraction for every decade up, zero and one."""
    values = [0.0, 1.0]
    for bits in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**bits + 1, dtype=torch.float32)
        fractions = 10 ** (bits - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [*fractions.tolist(), *(-fractions).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def reference_dequantise(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch, all at once."""
    halves = torch.stack([codes >> 4, codes & 15], dim=1).int()
    values = codebook(codes.device)[halves].view(-1, BLOCK) * absmax[:, None]
    return values.view(rows, columns).to(dtype)


def dequantise_by_pairs(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """On the CPU without C++: one look-up a byte gives both of its elements, a chunk at a time."""
    out = torch.empty(rows, columns, dtype=dtype)
    blocks, step = out.view(-1, BLOCK), 2 * CHUNK // BLOCK
    for i, piece in enumerate(codes.split(CHUNK)):
        values = _pairs().index_select(0, piece.int()).view(torch.float32).view(-1, BLOCK)
        here = slice(i * step, i * step + values.shape[0])
        torch.mul(values, absmax[here, None], out=values)
        blocks[here].copy_(values)
    return out


def dequantise_compiled(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """In C++ to bf16 and fp32, its two types; by pairs to others."""
    if dtype not in COMPILED:
        return dequantise_by_pairs(codes, absmax, rows, columns, dtype)
    book = codebook(codes.device)
    out: Tensor = torch.ops.peftdyno_cpu.nf4_dequantise(codes, absmax, book, rows, columns, dtype)
    return out


def absmax_compiled(codes: Tensor, absmax: Tensor, offsets: Tensor, sizes: Sequence[int]) -> Tensor:
    """In C++."""
    book = dynamic_codes(codes.device)
    out: Tensor = torch.ops.peftdyno_cpu.nf4_absmax(codes, absmax, offsets, book, sizes)
    return out


def reference_absmax(codes: Tensor, absmax: Tensor, offsets: Tensor, sizes: Sequence[int]) -> Tensor:
    """Plain PyTorch, module by module."""
    pieces, first = [], 0
    values = dynamic_codes(codes.device)[codes.int()]
    for offset, piece in zip(offsets, values.split(list(sizes)), strict=True):
        count = -(-piece.shape[0] // NESTED_BLOCK)
        scale = absmax[first : first + count].repeat_interleave(NESTED_BLOCK)[: piece.shape[0]]
        pieces.append(piece * scale + offset)
        first += count
    return torch.cat(pieces)


def dequantise_cost(codes: Tensor, absmax: Tensor, rows: int, columns: int, dtype: torch.dtype) -> OwnedCost:
    """One multiplication an element; codes and scales are read, the dense weight is written."""
    n = rows * columns
    held = min(CHUNK, codes.numel()) * 12  # an index of 4 bytes and two fp32 values for each byte of codes
    return OwnedCost(Cost(pointwise=n, bytes=row_bytes(codes, absmax) + n * dtype.itemsize, workspace=held))


def absmax_cost(codes: Tensor, absmax: Tensor, offsets: Tensor, sizes: Sequence[int]) -> OwnedCost:
    """A multiplication and an addition a block of the weight."""
    n = codes.numel()
    return OwnedCost(Cost(pointwise=2 * n, bytes=row_bytes(codes, absmax, offsets) + 4 * n, workspace=4 * n))


DEQUANTISE = primitive(
    "nf4_dequantise(Tensor codes, Tensor absmax, int rows, int columns, ScalarType dtype) -> Tensor",
    reference=reference_dequantise,
    shape=lambda codes, absmax, rows, columns, dtype: codes.new_empty(rows, columns, dtype=dtype),
    cost=dequantise_cost,
    cpu=dequantise_compiled if cpu.implementations("nf4_dequantise") else dequantise_by_pairs,
    **triton.implementations("nf4_dequantise"),
)
ABSMAX = primitive(
    "nf4_absmax(Tensor codes, Tensor absmax, Tensor offsets, int[] sizes) -> Tensor",
    reference=reference_absmax,
    shape=lambda codes, absmax, offsets, sizes: absmax.new_empty(codes.shape[0]),
    cost=absmax_cost,
    **({"cpu": absmax_compiled} if cpu.implementations("nf4_absmax") else {}),
    **triton.implementations("nf4_absmax"),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class NestedAbsmax:
    """Absolute maxima [out * in / 64] in 8 bits. codes: uint8, one a block of the weight; absmax: fp32, one for every
    256 blocks of a module; offsets: fp32 [M], their mean a module; `sizes` says how many blocks each module has."""

    codes: Tensor
    absmax: Tensor
    offsets: Tensor
    sizes: tuple[int, ...]

    def dense(self) -> Tensor:
        """In fp32."""
        absmax: Tensor = ABSMAX(self.codes, self.absmax, self.offsets, list(self.sizes))
        return absmax


@dataclass(frozen=True, eq=False, kw_only=True)
class Nf4Weight:
    """A frozen weight [out, in] in 4 bits: the rows of one module, or of several one below the other, each quantised
    by itself. `dtype` is what it is computed in."""

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def tensors(self) -> list[Tensor]:
        """What it is stored in."""
        scales = self.absmax
        if isinstance(scales, Tensor):
            return [self.codes, scales]
        return [self.codes, scales.codes, scales.absmax, scales.offsets]

    def scales(self) -> Tensor:
        """Absolute maxima of the blocks in fp32."""
        return self.absmax if isinstance(self.absmax, Tensor) else self.absmax.dense()

    def dense(self) -> Tensor:
        """A new tensor [out, in] in the compute dtype."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop as a new tensor in the compute dtype; both must lie on the border of a block."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        assert first % BLOCK == last % BLOCK == 0, (start, stop, self.shape)
        codes, scales = self.codes[first // 2 : last // 2], self.scales()[first // BLOCK : last // BLOCK]
        weight: Tensor = DEQUANTISE(codes, scales, stop - start, columns, self.dtype)
        return weight


Weight = Tensor | Nf4Weight
"""A frozen weight [out, in] as a product takes it."""


def dense(weight: Weight) -> Tensor:
    """The weight itself, or its dequantised form, which lives as long as the caller holds it."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def quantise(weight: Tensor, *, nested: bool = False) -> Nf4Weight:
    """One module's weight [out, in] in 4 bits, to be computed in the dtype it has now; `nested`: double quantisation.

    Raises ValueError where the number of elements is no multiple of 64.
    """
    rows, columns = weight.shape
    if rows * columns % BLOCK:
        raise ValueError(f"a weight of {rows} x {columns} elements cannot be divided into blocks of {BLOCK}")
    indices, absmax = _nearest(weight.reshape(-1), codebook(weight.device), BLOCK)
    return Nf4Weight(
        codes=(indices[0::2] << 4) | indices[1::2],
        absmax=_nest(absmax) if nested else absmax,
        shape=(rows, columns),
        dtype=weight.dtype,
    )


def stacked(modules: Sequence[Nf4Weight]) -> Nf4Weight:
    """Modules of one input one below the other."""
    first = modules[0]
    if len(modules) == 1:
        return first
    assert len({(m.shape[1], m.dtype, type(m.absmax)) for m in modules}) == 1, [m.shape for m in modules]
    return Nf4Weight(
        codes=torch.cat([m.codes for m in modules]),
        absmax=_stacked_absmax([m.absmax for m in modules]),
        shape=(sum(m.shape[0] for m in modules), first.shape[1]),
        dtype=first.dtype,
    )


def _stacked_absmax(scales: Sequence[Any]) -> Tensor | NestedAbsmax:
    if isinstance(scales[0], Tensor):
        return torch.cat(list(scales))
    return NestedAbsmax(
        codes=torch.cat([s.codes for s in scales]),
        absmax=torch.cat([s.absmax for s in scales]),
        offsets=torch.cat([s.offsets for s in scales]),
        sizes=tuple(size for s in scales for size in s.sizes),
    )


def _nest(absmax: Tensor) -> NestedAbsmax:
    offset = absmax.mean()
    codes, scale = _nearest(absmax - offset, dynamic_codes(absmax.device), NESTED_BLOCK)
    return NestedAbsmax(codes=codes, absmax=scale, offsets=offset[None], sizes=(absmax.shape[0],))


def _nearest(values: Tensor, book: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """uint8 [n] indices of the entries of `book` nearest to values [n] / absmax, the lower one where two are as near,
    and fp32 [ceil(n / block)] absmax of each block; the last block may be short."""
    count, short = values.shape[0], -values.shape[0] % block
    blocks = (torch.nn.functional.pad(values, (0, short)) if short else values).view(-1, block)
    indices = torch.empty_like(blocks, dtype=torch.uint8)
    absmax = torch.empty(blocks.shape[0], dtype=torch.float32, device=values.device)
    bounds, step = (book[:-1] + book[1:]) / 2, QUANTISED // block
    for piece, index, largest in zip(blocks.split(step), indices.split(step), absmax.split(step), strict=True):
        wide = piece.float()
        largest.copy_(wide.abs().amax(dim=1))
        scaled = wide * (1.0 / largest.clamp_min(1e-38))[:, None]
        index.copy_(torch.bucketize(scaled, bounds, out_int32=True))
    return indices.view(-1)[:count], absmax
