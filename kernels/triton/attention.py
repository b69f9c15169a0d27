"""Flash attention over a forest of segments on a GPU (Dao 2023): a tile of rows of one key head a program.

All query heads of a group are rows of one tile, so their keys are read once. Blocks of keys that every row sees are
computed without masks. Few tiles with long keys (decoding) are divided between programs, whose parts are combined
by their log-sums. Scores are in base 2 inside the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels import dispatch, replay, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton import attention_library as library
from peftdyno.kernels.triton.attention_tables import (
    QueryTiles,
    planned,
    query_tiles,
    replayed,
    roomy_query_tiles,
)
from peftdyno.kernels.triton.compiled import NARROW, WIDE, Compiled, Limits
from peftdyno.kernels.tuning import Tile

LOG2_E = tl.constexpr(1.4426950408889634)
DECODE_ROWS = 16
"""Most rows of a segment for which the tile is that of decoding."""
PIECE = 512
"""Keys of one part where a tile is divided."""


@triton.jit
def score(q, k, scale, softcap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """(scores in base 2, the soft cap's tanh or the scores)."""
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(s / softcap))
        t = tl.where(s < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        return softcap * t * LOG2_E, t
    else:
        return s * LOG2_E, s


@triton.jit
def key_bounds(link, first, last, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Of a link, seen from positions first..last: keys low:high that some row sees, of which low:a and b:high need
    masks; first key row and position of key 0."""
    key, count, position = tl.load(link), tl.load(link + 1), tl.load(link + 2)
    low, high = 0, tl.minimum(count, last + 1 - position)
    a = low
    if WINDOW > 0:
        low = tl.maximum(0, first - WINDOW + 1 - position)
        whole = tl.maximum(low, last - WINDOW + 1 - position)
        a = tl.minimum(low + (whole - low + BLOCK - 1) // BLOCK * BLOCK, tl.maximum(high, low))
    seen = tl.minimum(count, first + 1 - position)
    b = a + tl.maximum(seen - a, 0) // BLOCK * BLOCK
    return key, position, low, a, b, high


@triton.jit
def visible(query_position, key, position, high, WINDOW: tl.constexpr):
    """Which pairs of rows (positions [M, 1]) and keys ([1, N]) count."""
    gap = query_position - (key + position)
    seen = (gap >= 0) & (key < high)
    if WINDOW > 0:
        seen = seen & (gap < WINDOW)
    return seen


@triton.jit
def key_block(base, n0, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DOWN: tl.constexpr):
    """Pointers to a block of keys [WIDTH, BLOCK] or `DOWN` [BLOCK, WIDTH] from row n0 on: far by a scalar, near by 32
    bits, which take half the registers of pointers."""
    base += tl.cast(n0, tl.int64) * stride
    row, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    if DOWN:
        return base + (row[:, None] * stride + column[None, :])
    else:
        return base + (row[None, :] * stride + column[:, None])


@triton.jit
def _attend(
    state, total, top, q, k, v, k_stride, v_stride, low, high, position, query_position, scale, softcap,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for n0 in range(low, high, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        at_k, at_v = key_block(k, n0, k_stride, BLOCK, WIDTH, False), key_block(v, n0, v_stride, BLOCK, WIDTH, True)
        if MASKED or D != WIDTH:
            keys = tl.load(at_k, mask=(n < high)[None, :] & (column < D)[:, None], other=0.0)
            values = tl.load(at_v, mask=(n < high)[:, None] & (column < D)[None, :], other=0.0)
        else:
            keys, values = tl.load(at_k), tl.load(at_v)
        s, _ = score(q, keys, scale, softcap, CAP, PRECISION)
        if MASKED:
            s = tl.where(visible(query_position[:, None], n[None, :], position, high, WINDOW), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(s - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(p, axis=1)
        state = tl.dot(p.to(values.dtype), values, state * fade[:, None], input_precision=PRECISION)
        top = higher
    return state, total, top


@triton.jit
def _forward(
    q, k, v, prefix_k, prefix_v, out, lse, items, links, num_keys, num_rows, q_stride, q_head, k_stride, k_head,
    v_stride, v_head, prefix_stride, out_stride, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PREFIX: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item, kv = tl.program_id(0), tl.program_id(1)
    items += 6 * item
    start, queries, position0, first_row = tl.load(items), tl.load(items + 1), tl.load(items + 2), tl.load(items + 3)
    m, column = first_row + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    query, head = m // G, kv * G + m % G
    inside = (query < queries)[:, None] & (column < D)[None, :]
    token = (start + query).to(tl.int64)
    rows = tl.load(q + token[:, None] * q_stride + head[:, None] * q_head + column, mask=inside, other=0.0)
    position = position0 + query
    first = position0 + first_row // G
    last = position0 + tl.minimum((first_row + ROWS - 1) // G, queries - 1)
    state = tl.zeros([ROWS, WIDTH], tl.float32)
    total, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], float("-inf"), tl.float32)
    for link in range(tl.load(items + 4), tl.load(items + 5)):
        key, start_position, low, a, b, high = key_bounds(links + 3 * link, first, last, WINDOW, BLOCK)
        at_k, at_v, k_step, v_step = k + kv * k_head, v + kv * v_head, k_stride, v_stride
        if PREFIX:  # noqa: SIM102
            if key >= num_keys:
                key -= num_keys
                at_k, at_v = prefix_k + kv * D, prefix_v + kv * D
                k_step, v_step = prefix_stride, prefix_stride
        at_k += key.to(tl.int64) * k_step
        at_v += key.to(tl.int64) * v_step
        if WINDOW > 0:
            state, total, top = _attend(
                state, total, top, rows, at_k, at_v, k_step, v_step, low, a, start_position, position, scale,
                softcap, D, WIDTH, BLOCK, WINDOW, CAP, True, PRECISION,
            )  # fmt: skip
        state, total, top = _attend(
            state, total, top, rows, at_k, at_v, k_step, v_step, a, b, start_position, position, scale, softcap,
            D, WIDTH, BLOCK, WINDOW, CAP, False, PRECISION,
        )  # fmt: skip
        state, total, top = _attend(
            state, total, top, rows, at_k, at_v, k_step, v_step, b, high, start_position, position, scale,
            softcap, D, WIDTH, BLOCK, WINDOW, CAP, True, PRECISION,
        )  # fmt: skip
    divisor = tl.where(total == 0.0, 1.0, total)
    sums = (top + tl.log2(divisor)) / LOG2_E
    value = state / divisor[:, None]
    if SPLIT:
        slot = (item * tl.num_programs(1) + kv).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(lse + slot, tl.where(total == 0.0, float("-inf"), sums))
        tl.store(out + slot[:, None] * WIDTH + column, value)
    else:
        tl.store(lse + head * num_rows + token, sums, mask=query < queries)
        at = out + token[:, None] * out_stride + head[:, None] * D + column
        tl.store(at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine(
    values, sums, out, lse, parts, num_rows, out_stride,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part, kv, row = parts + 5 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, queries, first_row = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    query, column = (first_row + row) // G, tl.arange(0, WIDTH)
    if query < queries:
        state, total, top = tl.zeros([WIDTH], tl.float32), 0.0, float("-inf")
        for item in range(tl.load(part + 3), tl.load(part + 4)):
            slot = (item * tl.num_programs(1) + kv).to(tl.int64) * ROWS + row
            s = tl.load(sums + slot)
            higher = tl.maximum(top, s)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            fade, share = tl.exp(top - finite), tl.exp(s - finite)
            state = state * fade + share * tl.load(values + slot * WIDTH + column)
            total = total * fade + share
            top = higher
        head, token = kv * G + (first_row + row) % G, (start + query).to(tl.int64)
        tl.store(lse + head * num_rows + token, top + tl.log(total))
        at = out + token * out_stride + head * D + column
        tl.store(at, (state / total).to(out.dtype.element_ty), mask=column < D)


def width_class(head_dim: int) -> int:
    """Width of a head as tiles are chosen by it."""
    return min((width for width in (64, 128) if head_dim <= width), default=256)


def tile_name(head_dim: int, num_rows: int) -> str:
    """Entry of the forward kernel's tile by width of a head and number of rows of the longest segment."""
    width = width_class(head_dim)
    if num_rows > DECODE_ROWS:
        return f"attention/{width}"
    return "attention/decode/256" if width == 256 else "attention/decode"


def tile(q: Tensor, key_heads: int, num_rows: int) -> Tile:
    """The forward kernel's tile where the longest segment has so many rows; `columns` are keys."""
    return tuning.tile(tile_name(q.shape[2], num_rows), tile_shape(q, key_heads), q.device, q.dtype)


def tile_shape(q: Tensor, key_heads: int) -> tuple[int, int, int, int]:
    """Tokens, heads, key heads and width of a head, by which tiles of attention are measured."""
    n, heads, d = q.shape
    return n, heads, key_heads, d


def _piece(tiles: int, key_heads: int, device: torch.device, longest: int) -> int:
    """0, or the keys of a part: where the tiles alone would leave most of the GPU idle."""
    if dispatch.meant(device).type != "cuda" or longest <= 2 * PIECE:
        return 0
    return PIECE if tiles * key_heads < tuning.multiprocessors(device) else 0


def _plan(
    segments: Tensor,
    chain: Tensor,
    q: Tensor,
    key_heads: int,
    window: int,
    split: bool | None = None,
) -> tuple[Tile, QueryTiles]:
    """(tile, work list) of the forward pass; `split` says whether keys are divided, None to decide it here."""
    group = q.shape[1] // key_heads
    longest = int(segments[:, 1].max()) * group if len(segments) else 0
    sizes, device = tile(q, key_heads, longest), q.device
    count = int((-(-segments[:, 1] * group // sizes.rows)).sum()) if len(segments) else 0
    if split is None:
        split = _piece(count, key_heads, device, int(chain[:, 1].max()) if len(chain) else 0) > 0
    piece = PIECE if split else 0
    return sizes, query_tiles(segments, chain, group, sizes.rows, piece, window, device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    segments: Tensor,
    chain: Tensor,
    scale: float,
    window: int,
    softcap: float,
    spare: int,
) -> tuple[Tensor, Tensor]:
    """out [Nq, H d] and lse [H, Nq]."""
    call = library.chosen("attention", (q, k, v), prefix_k, (segments, chain), (scale, window, softcap))
    if call is not None:
        return library.forward(call, q, k, v, spare)
    (n, heads, d), key_heads = q.shape, k.shape[1]
    group = heads // key_heads
    out = with_spare(n, heads * d, spare, q)
    lse = torch.zeros(heads, n, dtype=torch.float32, device=q.device)
    key = ("forward", group, key_heads, d, window, q.device, tile(q, key_heads, 1), tile(q, key_heads, 128))
    tables = replay.active()
    if tables is None:
        sizes, tiles = planned(segments, key, lambda: _plan(segments, chain, q, key_heads, window))
    elif tables.any_layout:
        sizes = tile(q, key_heads, n * group)
        tiles = roomy_query_tiles(tables, segments, chain, n, group, sizes.rows, q.device)
    else:  # without the window, whose pieces of keys would grow and shrink in number
        sizes, tiles = replayed(tables, segments, key, lambda split: _plan(segments, chain, q, key_heads, 0, split))
    if len(tiles.items):
        _launch(q, k, v, (prefix_k, prefix_v), out, lse, sizes, tiles, (scale, window, softcap))
    return out, lse


def prefix_rows(prefix: Tensor | None, like: Tensor) -> Tensor:
    """The prefix in the dtype of the keys, its heads and columns dense; the keys themselves where there is none."""
    return like if prefix is None else prefix.to(like.dtype).contiguous()


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    lse: Tensor,
    sizes: Tile,
    tiles: QueryTiles,
    options: tuple[float, int, float],
) -> None:
    (n, _, d), key_heads = q.shape, k.shape[1]
    group, width = q.shape[1] // key_heads, max(16, triton.next_power_of_2(d))
    scale, window, softcap = options
    count = len(tiles.items)
    target, sums = out, lse
    if tiles.split:
        target = q.new_empty(count, key_heads, sizes.rows, width, dtype=torch.float32)
        sums = q.new_empty(count, key_heads, sizes.rows, dtype=torch.float32)
    _forward[(count, key_heads)](
        q, k, v, prefix_rows(prefix[0], k), prefix_rows(prefix[1], v), target, sums, tiles.items, tiles.links,
        k.shape[0], n, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], key_heads * d, out.stride(0), scale,
        softcap, G=group, D=d, WIDTH=width, ROWS=sizes.rows, BLOCK=sizes.columns, WINDOW=window, CAP=softcap != 0.0,
        PREFIX=prefix[0] is not None, SPLIT=tiles.split, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    if tiles.split:
        _combine[(len(tiles.parts), key_heads, sizes.rows)](
            target, sums, out, lse, tiles.parts, n, out.stride(0), G=group, D=d, WIDTH=width, ROWS=sizes.rows
        )


def types(names: str, store: str = "*bf16") -> dict[str, str]:
    """Argument types of the attention kernels by their names, for compiling ahead of time."""
    known = dict.fromkeys(("items", "links", "parts", "readers"), "*i32")
    known |= dict.fromkeys(("lse", "delta", "sums", "values", "partial_k", "partial_v"), "*fp32")
    known |= dict.fromkeys(("scale", "softcap"), "fp32")
    known |= dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v", "out", "dout", "dq", "dk", "dv"), "*bf16")
    known |= {"out": store, "dprefix_k": "*fp32", "dprefix_v": "*fp32"}
    return {name: known.get(name, "i32") for name in names.split()}


_FORWARD = (
    "q k v prefix_k prefix_v out lse items links num_keys num_rows q_stride q_head k_stride k_head v_stride v_head"
    " prefix_stride out_stride scale softcap"
)


def _case(name: str, d: int, kind: str = "", store: str = "*bf16", **options: Any) -> Compiled:
    constants = {"G": 4, "D": d, "WIDTH": d, "PRECISION": "tf32"}
    constants |= {"WINDOW": 0, "CAP": False, "PREFIX": False, "SPLIT": False} | options
    spills = 96 if d == 256 else 16  # smaller tiles would not use Hopper's wide products
    matrix = NARROW if kind.startswith("decode") else WIDE
    limits = Limits(registers=255, spills=spills, spills_sm_100=64, matrix=matrix)
    return Compiled(name, _forward, types(_FORWARD, store), constants, limits=limits, tile=f"attention/{kind or d}")


COMPILED = [
    _case("attention", 128),
    _case("attention, 64 wide", 64),
    _case("attention, prefix", 128, PREFIX=True),
    _case("attention, window and softcap", 256, WINDOW=1024, CAP=True),
    _case("attention, decode", 128, "decode", "*fp32", SPLIT=True),
    _case("attention, decode, 256 wide", 256, "decode/256", "*fp32", SPLIT=True),
    Compiled(
        "attention, combine",
        _combine,
        types("values sums out lse parts num_rows out_stride"),
        {"G": 4, "D": 128, "WIDTH": 128, "ROWS": 16},
        limits=Limits(registers=64, shared=0),
    ),
]
