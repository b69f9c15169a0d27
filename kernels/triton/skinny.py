"""Products of token rows with low-rank factors: x A^T and dy B (long sums), dA and dB (sums over tokens), and the
masked term of dx. One launch serves all modules and runs; sums over tokens are finished in a second one. Ranks are
multiplied in pieces, so that the tiles hold whatever the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import tuning
from peftdyno.kernels.random import threshold
from peftdyno.kernels.triton.compiled import NARROW, WIDE, Compiled, Limits
from peftdyno.kernels.triton.dropout import dropped, keep
from peftdyno.kernels.triton.low_rank import Modules, field, store_u
from peftdyno.kernels.triton.row_chunks import RowChunks, row_chunks, sum_chunks

OUTER_CHUNK = 1024
"""Tokens over which one program sums dA or dB."""
PROJECT_PIECE, PIECE, PIECE_FP32 = 128, 64, 32
"""Ranks that are multiplied at a time: more would spill. A projection reads its rows again for each piece, so it takes
as many as it can. On sm_100 Triton 3.6 rounds 32-bit operands of 64 rows and more to tf32, whatever is asked for."""

DROPOUT_WORK = {80: 15.0, 90: 13.0, 100: 13.5}
"""Architecture -> most instructions an element at rank 16. With a mask to draw, they and not the bytes are the bound:
docs/decisions/gpu-kernels.md."""


@dataclass(frozen=True)
class Dropout:
    """Of one product's input: probability, token identities [N], keys [M, R] on the device of the tokens."""

    probability: float
    streams: Tensor
    keys: Tensor

    @classmethod
    def of(
        cls, probability: float, streams: Tensor | None, keys: Tensor | None, device: torch.device
    ) -> Dropout | None:
        """That of an operator's arguments; None without dropout."""
        if probability == 0.0:
            return None
        assert streams is not None and keys is not None, "dropout needs the tokens' identities and the runs' keys"
        return cls(probability, streams, keys.to(device).contiguous())

    @property
    def limit(self) -> int:
        """16-bit halves below it are dropped."""
        return threshold(self.probability)

    @property
    def kept(self) -> float:
        """1 / (the share that is kept)."""
        return 1.0 / (1.0 - self.limit / 65536)


@triton.jit
def _project(
    source, factor, narrow, wide, table, modules, streams, keys, K, source_stride, rank_stride, depth_stride,
    narrow_stride, wide_stride, num_runs, limit, kept,
    OWN_COLUMNS: tl.constexpr, DROP: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, chunk = tl.program_id(0) // PIECES, tl.program_id(1)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rank, p0 = field(modules, m, 0, ALIGNED), field(modules, m, 2, ALIGNED)
    r0 = tl.program_id(0) % PIECES * RANK
    rows, r = start + tl.arange(0, TOKENS), r0 + tl.arange(0, RANK)
    row = rows.to(tl.int64)[:, None]
    here = (rows < stop)[:, None]
    if OWN_COLUMNS:
        first = field(modules, m, 3, ALIGNED)
        length = field(modules, m, 4, ALIGNED) - first
        source += first
        factor += first.to(tl.int64) * depth_stride
    else:
        length = K
    if DROP:
        stream = tl.load(streams + rows, mask=rows < stop, other=0)
        key = tl.load(keys + m * num_runs + run)
    # Far into the factor by a scalar, from there by 32 bits: pointers of a whole tile would take twice the registers.
    factor += (p0 + run * rank + r0).to(tl.int64) * rank_stride
    near = tl.arange(0, RANK)[None, :] * rank_stride + tl.arange(0, BLOCK)[:, None] * depth_stride
    total = tl.zeros([TOKENS, RANK], tl.float32)
    for k0 in range(0, length, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x = tl.load(source + row * source_stride + k[None, :], mask=here & (k < length)[None, :], other=0.0)
        if DROP:
            x = dropped(x, stream, key, k0, limit)
        at = factor + tl.cast(k0, tl.int64) * depth_stride + near
        f = tl.load(at, mask=(k < length)[:, None] & (r < rank)[None, :], other=0.0)
        total = tl.dot(x, f, total, input_precision=PRECISION)
    value = (total * kept).to(narrow.dtype.element_ty)
    u0, inside = field(modules, m, 1, ALIGNED), here & (r < rank)[None, :]
    store_u(value, narrow, wide, row, r, inside, u0, p0, rank, run, num_runs, narrow_stride, wide_stride, WIDE)


@triton.jit
def _outer(
    left, right, partials, table, modules, streams, keys, factors, K, left_stride, right_stride, width,
    num_runs, limit,
    OF_B: tl.constexpr, DROP: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, chunk = tl.program_id(1) // PIECES, tl.program_id(2)
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rank, u0 = field(modules, m, 0, ALIGNED), field(modules, m, 1, ALIGNED)
    c0, r0 = tl.program_id(0) * BLOCK, tl.program_id(1) % PIECES * RANK
    c, r = c0 + tl.arange(0, BLOCK), r0 + tl.arange(0, RANK)
    partials += chunk.to(tl.int64) * width
    if OF_B:
        first = field(modules, m, 3, ALIGNED)
        length = field(modules, m, 4, ALIGNED) - first
        right += first
        at = partials + field(modules, m, 5, ALIGNED) + c[None, :].to(tl.int64) * rank + r[:, None]
    else:
        length = K
        at = partials + u0.to(tl.int64) * K + r[:, None].to(tl.int64) * K + c[None, :]
    if (c0 < length) & (r0 < rank):
        total = tl.zeros([RANK, BLOCK], tl.float32)
        if DROP:
            key = tl.load(keys + m * num_runs + run)
        for t0 in range(start, stop, TOKENS):
            rows = t0 + tl.arange(0, TOKENS)
            row = rows.to(tl.int64)
            u = tl.load(
                left + row[None, :] * left_stride + u0 + r[:, None],
                mask=(rows < stop)[None, :] & (r < rank)[:, None],
                other=0.0,
            )
            x = tl.load(
                right + row[:, None] * right_stride + c[None, :],
                mask=(rows < stop)[:, None] & (c < length)[None, :],
                other=0.0,
            )
            if DROP:
                stream = tl.load(streams + rows, mask=rows < stop, other=0)
                x = dropped(x, stream, key, c0, limit)
            total = tl.dot(u, x, total, input_precision=PRECISION)
        total *= tl.load(factors + m * num_runs + run)
        tl.store(at, total, mask=(r < rank)[:, None] & (c < length)[None, :])


@triton.jit
def _add_masked(
    dx, du, down, table, modules, streams, keys, K, num_modules, num_runs, dx_stride, du_stride, down_stride,
    limit, kept,
    RANK: tl.constexpr, PIECES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, c0 = tl.program_id(1), tl.program_id(0) * BLOCK
    start, stop = tl.load(table + 3 * chunk), tl.load(table + 3 * chunk + 1)
    run = tl.load(table + 3 * chunk + 2)
    rows, c = start + tl.arange(0, TOKENS), c0 + tl.arange(0, BLOCK)
    row = rows.to(tl.int64)[:, None]
    here, inside = (rows < stop)[:, None], (c < K)[None, :]
    stream = tl.load(streams + rows, mask=rows < stop, other=0)
    at = dx + row * dx_stride + c[None, :]
    total = tl.load(at, mask=here & inside, other=0.0).to(tl.float32)
    for m in range(num_modules):
        rank, u0 = field(modules, m, 0, ALIGNED), field(modules, m, 1, ALIGNED)
        p0 = field(modules, m, 2, ALIGNED) + run * rank
        term = tl.zeros([TOKENS, BLOCK], tl.float32)
        for piece in range(PIECES):
            r = piece * RANK + tl.arange(0, RANK)
            p = (p0 + r).to(tl.int64)[:, None]
            u = tl.load(du + row * du_stride + u0 + r[None, :], mask=here & (r < rank)[None, :], other=0.0)
            a = tl.load(down + p * down_stride + c[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
            term = tl.dot(u, a, term, input_precision=PRECISION)
        key = tl.load(keys + m * num_runs + run)
        total += tl.where(keep(stream, key, c0, limit, BLOCK), kept, 0.0) * term
    tl.store(at, total.to(dx.dtype.element_ty), mask=here & inside)


def precision(x: Tensor) -> str:
    """float32 products in full; narrower types are exact in any case."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _pieces(rank: int, most: int, itemsize: int = 2) -> dict[str, int]:
    """A padded rank in pieces of at most so many: the kernels' constants."""
    most = most if itemsize == 2 else min(most, PIECE_FP32)
    return {"RANK": min(rank, most), "PIECES": triton.cdiv(rank, most)}


def project(
    x: Tensor,
    factor: Tensor,
    modules: Modules,
    runs: Sequence[int],
    wide: Tensor | None,
    *,
    of_b: bool,
    dropout: Dropout | None = None,
) -> Tensor:
    """u [N, sum of r]: each token's row times its run's factors, A (`factor` [P, in]) or, `of_b`, s B [out, P].

    `wide` [N, P] receives the same with zeros in the columns of other runs.
    """
    n = x.shape[0]
    u = x.new_empty(n, modules.columns)
    tile = tuning.tile("lora_project", (n, x.shape[1], modules.rank), x.device, x.dtype)
    chunks = row_chunks(runs, tile.rows, x.device)
    strides = (factor.stride(1), factor.stride(0)) if of_b else factor.stride()
    pieces = _pieces(modules.rank, PROJECT_PIECE, x.itemsize)
    if chunks.count:
        _project[(len(modules.ranks) * pieces["PIECES"], chunks.count)](
            x, factor, u, u if wide is None else wide, chunks.table, modules.table,
            modules.table if dropout is None else dropout.streams, modules.table if dropout is None else dropout.keys,
            x.shape[1], x.stride(0), *strides, u.stride(0), 0 if wide is None else wide.stride(0),
            modules.num_runs, 0 if dropout is None else dropout.limit, 1.0 if dropout is None else dropout.kept,
            OWN_COLUMNS=of_b, DROP=dropout is not None, WIDE=wide is not None, **pieces,
            TOKENS=tile.rows, BLOCK=tile.columns, ALIGNED=modules.aligned, PRECISION=precision(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return u


def outer(
    left: Tensor,
    right: Tensor,
    modules: Modules,
    runs: Sequence[int],
    *,
    of_b: bool,
    dropout: Dropout | None = None,
) -> list[Tensor]:
    """Every module's dA [R, r, in] = du^T drop(x) or, `of_b`, dB [R, out, r] = s dy^T u, in fp32."""
    k = right.shape[1]
    shapes = [
        (stop - start, rank) if of_b else (rank, k)
        for rank, (start, stop) in zip(modules.ranks, modules.rows, strict=True)
    ]
    width = sum(a * b for a, b in shapes)
    tile = tuning.tile("lora_outer", (*right.shape, modules.rank), right.device, right.dtype)
    chunks = row_chunks(runs, OUTER_CHUNK, right.device)
    partials = left.new_empty(chunks.count, width, dtype=torch.float32)
    factors = modules.scaling if of_b else torch.full_like(modules.scaling, 1.0 if dropout is None else dropout.kept)
    pieces = _pieces(modules.rank, PIECE, right.itemsize)
    longest = max(stop - start for start, stop in modules.rows) if of_b else k
    if chunks.count:
        _outer[(triton.cdiv(longest, tile.columns), len(modules.ranks) * pieces["PIECES"], chunks.count)](
            left, right, partials, chunks.table, modules.table,
            modules.table if dropout is None else dropout.streams, modules.table if dropout is None else dropout.keys,
            factors, k, left.stride(0), right.stride(0), width, modules.num_runs,
            0 if dropout is None else dropout.limit,
            OF_B=of_b, DROP=dropout is not None, **pieces, TOKENS=tile.rows, BLOCK=tile.columns,
            ALIGNED=modules.aligned, PRECISION=precision(right), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return weight_gradients(partials, chunks, shapes)


def weight_gradients(partials: Tensor, chunks: RowChunks, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Every module's gradient [R, *shape] from its parts [chunks, values of all modules]."""
    sums = sum_chunks(partials, chunks).view(chunks.first.numel() - 1, partials.shape[1])
    pieces = sums.split([a * b for a, b in shapes], dim=1)
    return [piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def add_masked(dx: Tensor, du: Tensor, down: Tensor, modules: Modules, runs: Sequence[int], dropout: Dropout) -> None:
    """dx += sum over modules of mask_m (du_m A_m) / (1 - p), in place; the masks are drawn again."""
    tile = tuning.tile("lora_add", (*dx.shape, modules.rank), dx.device, dx.dtype)
    chunks, k = row_chunks(runs, tile.rows, dx.device), dx.shape[1]
    if chunks.count:
        _add_masked[(triton.cdiv(k, tile.columns), chunks.count)](
            dx, du, down, chunks.table, modules.table, dropout.streams, dropout.keys, k, len(modules.ranks),
            modules.num_runs, dx.stride(0), du.stride(0), down.stride(0), dropout.limit, dropout.kept,
            **_pieces(modules.rank, PIECE, dx.itemsize), TOKENS=tile.rows, BLOCK=tile.columns, ALIGNED=modules.aligned,
            PRECISION=precision(dx), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def types(names: str, **others: str) -> dict[str, str]:
    """Types of a low-rank kernel's arguments as `Compiled` wants them; those that are not given are 32-bit integers."""
    known = {"table": "*i32", "modules": "*i32", "streams": "*i64", "keys": "*i64", "kept": "fp32"}
    return {name: (others | known).get(name, "i32") for name in names.split()}


def _cases() -> list[Compiled]:
    project_types = types(
        "source factor narrow wide table modules streams keys K source_stride rank_stride depth_stride narrow_stride"
        " wide_stride num_runs limit kept",
        source="*bf16", factor="*bf16", narrow="*bf16", wide="*bf16",
    )  # fmt: skip
    outer_types = types(
        "left right partials table modules streams keys factors K left_stride right_stride width num_runs limit",
        left="*bf16", right="*bf16", partials="*fp32", factors="*fp32",
    )  # fmt: skip
    add_types = types(
        "dx du down table modules streams keys K num_modules num_runs dx_stride du_stride down_stride limit kept",
        dx="*bf16", du="*bf16", down="*bf16",
    )  # fmt: skip

    def case(name: str, rank: int, kernel: Any, types: dict[str, str], tile: str, **options: Any) -> Compiled:
        most = PROJECT_PIECE if kernel is _project else PIECE
        constants = _pieces(rank, most) | {"ALIGNED": True, "PRECISION": "tf32"} | options
        wide = kernel is not _outer or rank >= 64
        limits = Limits(registers=255, matrix=WIDE if wide else NARROW, work=DROPOUT_WORK if rank == 16 else {})
        name = f"lora: {name}, rank {rank}"
        return Compiled(
            name, kernel, types, constants, limits=limits, tile=tile, sizes=("TOKENS", "BLOCK"),
            fp32=_pieces(rank, most, 4),
        )  # fmt: skip

    def project_case(name: str, rank: int, **options: Any) -> Compiled:
        """Factors whose rows are dense: the compiler is told of strides of 1."""
        return case(name, rank, _project, project_types, "lora_project", WIDE=True, **options)

    made = []
    for rank in (16, 64, 256):
        made += [
            project_case("x A^T, dropout", rank, OWN_COLUMNS=False, DROP=True, depth_stride=1),
            project_case("dy B", rank, OWN_COLUMNS=True, DROP=False, rank_stride=1),
            case("dA, dropout", rank, _outer, outer_types, "lora_outer", OF_B=False, DROP=True),
            case("dB", rank, _outer, outer_types, "lora_outer", OF_B=True, DROP=False),
            case("masked dx", rank, _add_masked, add_types, "lora_add"),
        ]
    return made


COMPILED = _cases()
