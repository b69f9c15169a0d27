"""Backward of attention over a forest of segments on a GPU: one pass for dq, one for dk and dv, no atomics.

The first pass has the forward pass's tiles and also writes D = sum(dout * out) a row. The second has a tile of keys a
program and reads the rows of every segment that sees them; where those are many, several programs write partial
sums that a third launch adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import replay, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton import attention_library as library
from peftdyno.kernels.triton.attention import (
    LOG2_E,
    key_block,
    key_bounds,
    prefix_rows,
    score,
    tile_shape,
    types,
    visible,
    width_class,
)
from peftdyno.kernels.triton.attention_tables import (
    KeyTiles,
    QueryTiles,
    key_tiles,
    planned,
    query_tiles,
    roomy_key_tiles,
    roomy_query_tiles,
)
from peftdyno.kernels.triton.compiled import NARROW, WIDE, Compiled, Limits
from peftdyno.kernels.tuning import Tile

MOST_ROWS = 16384
"""Rows that one program of the second pass reads before its keys are shared between several."""


@triton.jit
def _query_steps(
    dq, q, dout, lse, delta, k, v, k_stride, v_stride, low, high, position, query_position, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for n0 in range(low, high, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        mask = (n < high)[None, :] & (column < D)[:, None]
        keys = tl.load(key_block(k, n0, k_stride, BLOCK, WIDTH, False), mask=mask, other=0.0)
        values = tl.load(key_block(v, n0, v_stride, BLOCK, WIDTH, False), mask=mask, other=0.0)
        s, t = score(q, keys, scale, softcap, CAP, PRECISION)
        p = tl.exp2(s - lse[:, None])
        p = tl.where(visible(query_position[:, None], n[None, :], position, high, WINDOW), p, 0.0)
        ds = p * (tl.dot(dout, values, input_precision=PRECISION) - delta[:, None])
        if CAP:
            ds *= 1.0 - t * t
        dq = tl.dot(ds.to(keys.dtype), tl.trans(keys), dq, input_precision=PRECISION)
    return dq


@triton.jit
def _query_gradient(
    dout, q, k, v, prefix_k, prefix_v, out, lse, delta, dq, items, links, num_keys, num_rows, q_stride, q_head,
    k_stride, k_head, v_stride, v_head, prefix_stride, out_stride, dout_stride, dq_stride, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1)
    items += 6 * tl.program_id(0)
    start, queries, position0, first_row = tl.load(items), tl.load(items + 1), tl.load(items + 2), tl.load(items + 3)
    m, column = first_row + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    query, head = m // G, kv * G + m % G
    live = query < queries
    inside = live[:, None] & (column < D)[None, :]
    token = (start + query).to(tl.int64)
    at = head[:, None] * D + column
    rows = tl.load(q + token[:, None] * q_stride + head[:, None] * q_head + column, mask=inside, other=0.0)
    grad = tl.load(dout + token[:, None] * dout_stride + at, mask=inside, other=0.0)
    value = tl.load(out + token[:, None] * out_stride + at, mask=inside, other=0.0)
    d = tl.sum(grad.to(tl.float32) * value.to(tl.float32), axis=1)
    tl.store(delta + head * num_rows + token, d, mask=live)
    sums = tl.load(lse + head * num_rows + token, mask=live, other=0.0) * LOG2_E
    position = position0 + query
    first = position0 + first_row // G
    last = position0 + tl.minimum((first_row + ROWS - 1) // G, queries - 1)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for link in range(tl.load(items + 4), tl.load(items + 5)):
        key, start_position, low, _, _, high = key_bounds(links + 3 * link, first, last, WINDOW, BLOCK)
        at_k, at_v, k_step, v_step = k + kv * k_head, v + kv * v_head, k_stride, v_stride
        if PREFIX:  # noqa: SIM102
            if key >= num_keys:
                key -= num_keys
                at_k, at_v = prefix_k + kv * D, prefix_v + kv * D
                k_step, v_step = prefix_stride, prefix_stride
        at_k += key.to(tl.int64) * k_step
        at_v += key.to(tl.int64) * v_step
        total = _query_steps(
            total, rows, grad, sums, d, at_k, at_v, k_step, v_step, low, high, start_position, position, scale, softcap,
            D, WIDTH, BLOCK, WINDOW, CAP, PRECISION,
        )  # fmt: skip
    total *= scale
    tl.store(dq + token[:, None] * dq_stride + at, total.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _key_steps(
    dk, dv, keys, values, q, dout, lse, delta, num_rows, q_stride, q_head, dout_stride, start, low, high, position0,
    n, count, position, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for m0 in range(low, high, ROWS):
        m = m0 + tl.arange(0, ROWS)
        query, head = m // G, m % G
        token, first = (start + query).to(tl.int64), tl.cast(start + m0 // G, tl.int64)
        near = (query - m0 // G)[:, None]  # far by a scalar, near by 32 bits
        mask = (m < high)[:, None] & (column < D)[None, :]
        at_q = q + first * q_stride + (near * q_stride + head[:, None] * q_head + column)
        at_dout = dout + first * dout_stride + (near * dout_stride + head[:, None] * D + column)
        rows, grad = tl.load(at_q, mask=mask, other=0.0), tl.load(at_dout, mask=mask, other=0.0)
        sums = tl.load(lse + head * num_rows + token, mask=m < high, other=float("inf"))
        d = tl.load(delta + head * num_rows + token, mask=m < high, other=0.0)
        s, t = score(keys, tl.trans(rows), scale, softcap, CAP, PRECISION)
        p = tl.exp2(s - sums[None, :] * LOG2_E)
        p = tl.where(visible((position0 + query)[None, :], n[:, None], position, count, WINDOW), p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = p * (tl.dot(values, tl.trans(grad), input_precision=PRECISION) - d[None, :])
        if CAP:
            ds *= 1.0 - t * t
        dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _store_keys(
    total_k, total_v, dk, dv, dprefix_k, dprefix_v, key, n, count, kv, num_keys, dk_stride, prefix_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = (n < count)[:, None] & (column < D)[None, :]
    row = (key + n).to(tl.int64)[:, None]
    if PREFIX:
        mine = inside & (row >= num_keys)
        at = (row - num_keys) * prefix_stride + kv * D + column
        tl.store(dprefix_k + at, total_k, mask=mine)
        tl.store(dprefix_v + at, total_v, mask=mine)
        inside = inside & (row < num_keys)
    at = row * dk_stride + kv * D + column
    tl.store(dk + at, total_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, total_v.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _key_gradient(
    dout, q, k, v, prefix_k, prefix_v, lse, delta, dk, dv, dprefix_k, dprefix_v, partial_k, partial_v, items, readers,
    num_keys, num_rows, q_stride, q_head, k_stride, k_head, v_stride, v_head, prefix_stride, dout_stride, dk_stride,
    scale, softcap,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PREFIX: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1)
    items += 7 * tl.program_id(0)
    key, count, position, first = tl.load(items), tl.load(items + 1), tl.load(items + 2), tl.load(items + 3)
    n, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    at_k, at_v, k_step, v_step, from_row = k + kv * k_head, v + kv * v_head, k_stride, v_stride, key
    if PREFIX:  # noqa: SIM102
        if key >= num_keys:
            from_row = key - num_keys
            at_k, at_v = prefix_k + kv * D, prefix_v + kv * D
            k_step, v_step = prefix_stride, prefix_stride
    inside = (n < count)[:, None] & (column < D)[None, :]
    row = (from_row + n).to(tl.int64)[:, None]
    keys = tl.load(at_k + row * k_step + column, mask=inside, other=0.0)
    values = tl.load(at_v + row * v_step + column, mask=inside, other=0.0)
    oldest, newest = position + first, position + tl.minimum(first + BLOCK, count) - 1
    total_k, total_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    for reader in range(tl.load(items + 4), tl.load(items + 5)):
        start, queries = tl.load(readers + 3 * reader), tl.load(readers + 3 * reader + 1)
        position0 = tl.load(readers + 3 * reader + 2)
        low, high = tl.maximum(0, oldest - position0) * G, queries * G
        if WINDOW > 0:
            high = tl.minimum(queries, newest + WINDOW - position0) * G
        at_q, at_dout = q + kv * G * q_head, dout + kv * G * D
        at_lse, at_delta = lse + kv * G * num_rows, delta + kv * G * num_rows
        total_k, total_v = _key_steps(
            total_k, total_v, keys, values, at_q, at_dout, at_lse, at_delta, num_rows, q_stride, q_head, dout_stride,
            start, low, high, position0, n, count, position, scale, softcap, G, D, WIDTH, ROWS, WINDOW, CAP, PRECISION,
        )  # fmt: skip
    total_k *= scale
    slot = tl.load(items + 6)
    if SHARED:
        at = (slot * tl.num_programs(1) + kv).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mine = (column < D)[None, :] & ((slot + tl.zeros([BLOCK], tl.int32)) >= 0)[:, None]
        tl.store(partial_k + at[:, None] * D + column, total_k, mask=mine)
        tl.store(partial_v + at[:, None] * D + column, total_v, mask=mine)
        count = tl.where(slot >= 0, 0, count)
    _store_keys(
        total_k, total_v, dk, dv, dprefix_k, dprefix_v, key, n, count, kv, num_keys, dk_stride, prefix_stride, D, WIDTH,
        PREFIX,
    )  # fmt: skip


@triton.jit
def _sum_keys(
    partial_k, partial_v, dk, dv, dprefix_k, dprefix_v, parts, num_keys, dk_stride, prefix_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    part, kv = parts + 5 * tl.program_id(0), tl.program_id(1)
    key, count, first = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    n, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (n < count)[:, None] & (column < D)[None, :]
    total_k, total_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    for slot in range(tl.load(part + 3), tl.load(part + 4)):
        row = (slot * tl.num_programs(1) + kv).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total_k += tl.load(partial_k + row[:, None] * D + column, mask=inside, other=0.0)
        total_v += tl.load(partial_v + row[:, None] * D + column, mask=inside, other=0.0)
    _store_keys(
        total_k, total_v, dk, dv, dprefix_k, dprefix_v, key, n, count, kv, num_keys, dk_stride, prefix_stride, D, WIDTH,
        PREFIX,
    )  # fmt: skip


def query_tile(q: Tensor, key_heads: int) -> Tile:
    """Tile of the pass for dq; `columns` are keys."""
    return tuning.tile(f"attention_dq/{width_class(q.shape[2])}", tile_shape(q, key_heads), q.device, q.dtype)


def key_tile(q: Tensor, key_heads: int) -> Tile:
    """Tile of the pass for dk and dv: keys (`columns`) stay in registers, rows stream through."""
    return tuning.tile(f"attention_dk/{width_class(q.shape[2])}", tile_shape(q, key_heads), q.device, q.dtype)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    chain: Tensor,
    scale: float,
    window: int,
    softcap: float,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the fused qkv rows [N, (H + 2K) d] and, in fp32, of the prefix tensors."""
    call = library.chosen("attention_backward", (q, k, v), prefix_k, (segments, chain), (scale, window, softcap))
    if call is not None:
        return library.backward(call, dout, q, k, v, out, lse, spare)
    (n, heads, d), key_heads = q.shape, k.shape[1]
    group = heads // key_heads
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    dqkv = with_spare(n, (heads + 2 * key_heads) * d, spare, q)
    shape = (0, key_heads, d) if prefix_k is None else prefix_k.shape
    dprefix = [torch.zeros(shape, dtype=torch.float32, device=q.device) for _ in range(2)]
    rows, keys = query_tile(q, key_heads), key_tile(q, key_heads)
    by_query = _query_list(segments, chain, n, group, rows, q.device)
    by_key = _key_list(segments, chain, (n, k.shape[0] + shape[0]), group, keys, q.device)
    if by_key.covered < n + shape[0] or int(segments[:, 1].sum()) < n:
        dqkv.zero_()
    if len(by_query.items):
        tensors = (dout, q, k, v, prefix_rows(prefix_k, k), prefix_rows(prefix_v, v), out, lse)
        options = (scale, window, softcap, prefix_k is not None)
        delta = _launch_queries(tensors, dqkv, rows, by_query, options)
        _launch_keys((*tensors[:6], lse, delta), dqkv, dprefix, keys, by_key, options)
    return dqkv, dprefix[0], dprefix[1]


def _query_list(
    segments: Tensor, chain: Tensor, queries: int, group: int, tile: Tile, device: torch.device
) -> QueryTiles:
    """Work list of the first pass; positions alone decide what is seen, so it knows of no window."""
    tables = replay.active()
    if tables is not None:
        return roomy_query_tiles(tables, segments, chain, queries, group, tile.rows, device)
    key = ("dq", group, tile, device)
    tiles: QueryTiles = planned(segments, key, lambda: query_tiles(segments, chain, group, tile.rows, 0, 0, device))
    return tiles


def _key_list(
    segments: Tensor, chain: Tensor, rows: tuple[int, int], group: int, tile: Tile, device: torch.device
) -> KeyTiles:
    """Work list of the second pass, for so many rows of queries and of keys."""
    tables, options = replay.active(), (group, tile.columns, MOST_ROWS, device)
    if tables is not None:
        return roomy_key_tiles(tables, segments, chain, rows, *options)
    key = ("dk", group, tile, MOST_ROWS, device)
    tiles: KeyTiles = planned(segments, key, lambda: key_tiles(segments, chain, *options))
    return tiles


def _constants(q: Tensor, k: Tensor, sizes: Tile, options: tuple[float, int, float, bool]) -> dict[str, Any]:
    d = q.shape[2]
    return {
        "G": q.shape[1] // k.shape[1], "D": d, "WIDTH": max(16, triton.next_power_of_2(d)), "ROWS": sizes.rows,
        "BLOCK": sizes.columns, "WINDOW": options[1], "CAP": options[2] != 0.0, "PREFIX": options[3],
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": sizes.warps, "num_stages": sizes.stages,
    }  # fmt: skip


def _launch_queries(
    tensors: tuple[Tensor, ...], dqkv: Tensor, sizes: Tile, tiles: Any, options: tuple[float, int, float, bool]
) -> Tensor:
    dout, q, k, v, *_, out, lse = tensors
    n, key_heads = q.shape[0], k.shape[1]
    delta = torch.zeros_like(lse)
    _query_gradient[(len(tiles.items), key_heads)](
        *tensors, delta, dqkv, tiles.items, tiles.links, k.shape[0], n, *q.stride()[:2], *k.stride()[:2],
        *v.stride()[:2], key_heads * q.shape[2], out.stride(0), dout.stride(0), dqkv.stride(0), options[0], options[2],
        **_constants(q, k, sizes, options),
    )  # fmt: skip
    return delta


def _launch_keys(
    tensors: tuple[Tensor, ...],
    dqkv: Tensor,
    dprefix: list[Tensor],
    sizes: Tile,
    tiles: KeyTiles,
    options: tuple[float, int, float, bool],
) -> None:
    dout, q, k, v, *_ = tensors
    (n, heads, d), key_heads = q.shape, k.shape[1]
    dk, dv = dqkv[:, heads * d :], dqkv[:, (heads + key_heads) * d :]
    constants = _constants(q, k, sizes, options)
    parts = [q.new_empty(tiles.slots, key_heads, sizes.columns, d, dtype=torch.float32) for _ in range(2)]
    _key_gradient[(len(tiles.items), key_heads)](
        *tensors, dk, dv, *dprefix, *parts, tiles.items, tiles.readers, k.shape[0], n, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], key_heads * d, dout.stride(0), dqkv.stride(0), options[0], options[2],
        SHARED=tiles.slots > 0, **constants,
    )  # fmt: skip
    if tiles.slots:
        _sum_keys[(len(tiles.sums), key_heads)](
            *parts, dk, dv, *dprefix, tiles.sums, k.shape[0], dqkv.stride(0), key_heads * d, D=d,
            WIDTH=constants["WIDTH"], BLOCK=sizes.columns, PREFIX=options[3], num_warps=8,
        )  # fmt: skip


_QUERY = (
    "dout q k v prefix_k prefix_v out lse delta dq items links num_keys num_rows q_stride q_head k_stride k_head"
    " v_stride v_head prefix_stride out_stride dout_stride dq_stride scale softcap"
)
_KEY = (
    "dout q k v prefix_k prefix_v lse delta dk dv dprefix_k dprefix_v partial_k partial_v items readers num_keys"
    " num_rows q_stride q_head k_stride k_head v_stride v_head prefix_stride dout_stride dk_stride scale softcap"
)


_LOW = NARROW | {100: "UTCHMMA"}
"""Of dq where heads are 256 wide: 32 rows are too few for Hopper's wide products, not for Blackwell's."""


def _case(name: str, kernel: Any, tile: str, matrix: Mapping[int, str] = WIDE, **options: Any) -> Compiled:
    d = int(tile.split("/")[1])
    constants = {"G": 4, "D": d, "WIDTH": d, "PRECISION": "tf32", "WINDOW": 0, "CAP": False, "PREFIX": False} | options
    fp32 = 256 if tile == "attention_dq/256" else 32  # 16 x 16 is the smallest tile that there is
    limits = Limits(registers=255, spills_sm_100=64, spills_fp32=fp32, matrix=matrix)
    return Compiled(
        name, kernel, types(_QUERY if kernel is _query_gradient else _KEY), constants, limits=limits, tile=tile
    )


COMPILED = [
    _case("attention dq", _query_gradient, "attention_dq/128"),
    _case("attention dq, 64 wide, prefix", _query_gradient, "attention_dq/64", PREFIX=True),
    _case("attention dq, window and softcap", _query_gradient, "attention_dq/256", _LOW, WINDOW=1024, CAP=True),
    _case("attention dk dv", _key_gradient, "attention_dk/128", SHARED=False),
    _case("attention dk dv, prefix", _key_gradient, "attention_dk/128", PREFIX=True, SHARED=True),
    _case("attention dk dv, 64 wide", _key_gradient, "attention_dk/64", SHARED=True),
    _case(
        "attention dk dv, window and softcap",
        _key_gradient,
        "attention_dk/256",
        NARROW,
        WINDOW=1024,
        CAP=True,
        SHARED=False,
    ),
    Compiled(
        "attention dk dv, shared keys",
        _sum_keys,
        types("partial_k partial_v dk dv dprefix_k dprefix_v parts num_keys dk_stride prefix_stride"),
        {"D": 128, "WIDTH": 128, "BLOCK": 64, "PREFIX": True},
        num_warps=8,
        limits=Limits(registers=168),
    ),
]
