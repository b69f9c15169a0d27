"""Work lists of the attention kernels, made on the CPU once for a pack and kept for all its layers.

A row is a (query, query head of a group) pair: row m of a segment is query m // G, head m % G of the group. A link is
a range of keys with the position of its first. Since positions decide what is seen, a link may be cut anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peftdyno.kernels import replay
from peftdyno.kernels.triton.row_chunks import upload

Table = npt.NDArray[np.int32]
_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def planned(segments: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """`make()`, kept as long as the layout's own table lives."""
    plans = _PLANS.setdefault(segments, {})
    if key not in plans:
        plans[key] = make()
    return plans[key]


def replayed(
    tables: replay.Tables, segments: Tensor, key: tuple[Any, ...], make: Callable[[bool | None], tuple[Any, QueryTiles]]
) -> Any:
    """A recording's own (tile, work list) of a layout whose tables change between replays; `make` says with the layout
    as it is then, and is told whether the keys are divided, which stays as it was when recorded."""
    name = (id(segments), *key)
    if name not in tables.plans:
        _, tiles = tables.plans[name] = make(None)
        tables.kept.append(segments)
        tables.fills.append(lambda: _refill(tiles, make(tiles.split)[1]))
    return tables.plans[name]


def _roomy(
    tables: replay.Tables, segments: Tensor, key: tuple[Any, ...], most: dict[str, int], make: Callable[[], Tiles]
) -> Tiles:
    """A recording's own work list with room for any layout of its size; `most` are the rows that each of its tables may
    need, and `make` gives the list of the layout as it is then."""
    name = (id(segments), *key)
    if name not in tables.plans:
        first = make()
        wide: dict[str, Any] = {table: _empty(first, table, rows) for table, rows in most.items()}
        tiles = replace(first, **wide)
        _refill(tiles, first)
        tables.plans[name] = tiles
        tables.kept.append(segments)
        tables.fills.append(lambda: _refill(tiles, make()))
    found: Tiles = tables.plans[name]
    return found


def roomy_query_tiles(
    tables: replay.Tables, segments: Tensor, chain: Tensor, rows: int, group: int, block: int, device: torch.device
) -> QueryTiles:
    """Undivided tiles of a recording with `rows` queries, with room for any layout of so many segments and links."""
    most = {"items": rows * group // block + len(segments), "links": len(chain)}
    key = ("queries", group, block, device)
    return _roomy(tables, segments, key, most, lambda: query_tiles(segments, chain, group, block, 0, 0, device))


def roomy_key_tiles(
    tables: replay.Tables,
    segments: Tensor,
    chain: Tensor,
    rows: tuple[int, int],
    group: int,
    block: int,
    most_rows: int,
    device: torch.device,
) -> KeyTiles:
    """Tiles of keys of a recording with so many rows of queries and of keys, with room for any layout of so many
    segments and links.

    Two neighbouring groups of a range's readers have more than `most_rows` rows together, which bounds their number.
    """
    queries, keys = rows
    shared = queries * group > most_rows
    groups = 1 + 2 * queries * group // most_rows if shared else 1
    tiles = keys // block + len(chain)
    most = {"items": tiles * groups, "readers": len(chain), "sums": tiles if shared else 0}
    made = _roomy(
        tables, segments, ("keys", group, block, most_rows, device), most,
        lambda: key_tiles(segments, chain, group, block, most_rows, device),
    )  # fmt: skip
    return replace(made, slots=tiles * groups if shared else 0)


def _empty(tiles: Tiles, name: str, rows: int) -> Tensor:
    table: Tensor = getattr(tiles, name)
    return table.new_empty(rows, table.shape[1])


def _refill(old: QueryTiles | KeyTiles, new: QueryTiles | KeyTiles) -> None:
    """Write a work list where another lies that has room for it; what is left over is work of no rows."""
    for name in old.LISTS:
        target, source = getattr(old, name), getattr(new, name)
        assert len(source) <= len(target), (name, len(source), len(target))
        target[: len(source)].copy_(source, non_blocking=True)
        target[len(source) :].zero_()
    if isinstance(old, KeyTiles):
        old.items[len(new.items) :, 6] = NO_SLOT


@dataclass(frozen=True)
class QueryTiles:
    """items [T, 6]: first query row, number of queries, position of the first, first row of the tile, links first:last.
    links [L, 3]: first key row, number of keys, position of the first. Parts [P, 5] of a split tile, where split:
    first query row, number of queries, first row, and items first:last that hold its parts."""

    LISTS: ClassVar = ("items", "links", "parts")

    items: Tensor
    links: Tensor
    parts: Tensor
    split: bool


@dataclass(frozen=True)
class KeyTiles:
    """items [T, 7]: first key row, keys of the range, position of its first key, first key of the tile in the range,
    readers first:last, slot of a partial sum or -1. readers [L, 3]: first query row, number of queries, position of
    the first. sums [P, 5]: first key row, keys of the range, first key of the tile, slots first:last."""

    LISTS: ClassVar = ("items", "readers", "sums")

    items: Tensor
    readers: Tensor
    sums: Tensor
    slots: int
    covered: int
    """Key rows that some query may see."""


Tiles = TypeVar("Tiles", QueryTiles, KeyTiles)
NO_SLOT = -1
"""In place of the slot of a tile whose sum is not shared."""


def _first_positions(segments: Table, chain: Table) -> Table:
    """Position of each segment's first query: its last key is aligned to its last query."""
    own = chain[segments[:, 3] - 1]
    return own[:, 2] + own[:, 1] - segments[:, 1]


def _tiles(segments: Table, positions: Table, group: int, block: int) -> Table:
    """(first query row, queries, first position, first row, segment) of each tile, longest paths first."""
    counts = -(-segments[:, 1] * group // block)
    owner = np.repeat(np.arange(len(segments)), counts)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles = np.stack([segments[owner, 0], segments[owner, 1], positions[owner], step * block, owner], axis=1)
    last = tiles[:, 2] + (tiles[:, 3] + block) // group
    ordered: Table = tiles[np.argsort(-last, kind="stable")]
    return ordered


def query_tiles(
    segments: Tensor, chain: Tensor, group: int, block: int, piece: int, window: int, device: torch.device
) -> QueryTiles:
    """Tiles of `block` rows; with `piece` > 0 the keys of a tile are divided into parts of about that many keys."""
    table, links = segments.numpy(), chain.numpy()
    tiles = _tiles(table, _first_positions(table, links), group, block)
    if not piece:
        items = np.concatenate([tiles[:, :4], table[tiles[:, 4], 2:4]], axis=1)
        return QueryTiles(_int32(items, 6, device), _int32(links, 3, device), _int32([], 5, device), False)
    items_list: list[tuple[int, ...]] = []
    parts: list[tuple[int, ...]] = []
    cut: list[tuple[int, int, int]] = []
    for start, queries, position, row, owner in tiles.tolist():
        first_item, oldest = len(items_list), position + row // group - window + 1 if window else 0
        for link in range(table[owner, 2], table[owner, 3]):
            key, keys, position_of_key = links[link].tolist()
            for sub in _pieces(key, keys, position_of_key, piece, oldest):
                items_list.append((start, queries, position, row, len(cut), len(cut) + 1))
                cut.append(sub)
        parts.append((start, queries, row, first_item, len(items_list)))
    return QueryTiles(_int32(items_list, 6, device), _int32(cut, 3, device), _int32(parts, 5, device), True)


def _pieces(start: int, keys: int, position: int, piece: int, oldest: int) -> list[tuple[int, int, int]]:
    """A link in pieces, without those that lie before the window."""
    return [
        (start + at, min(piece, keys - at), position + at)
        for at in range(0, keys, piece)
        if position + min(at + piece, keys) > oldest
    ]


def key_tiles(
    segments: Tensor, chain: Tensor, group: int, block: int, most_rows: int, device: torch.device
) -> KeyTiles:
    """Tiles of `block` keys with the segments that read them; where those have more than `most_rows` rows together,
    the tile is shared between items that each write a partial sum."""
    table, links = segments.numpy(), chain.numpy()
    readers_of: dict[tuple[int, int, int], list[int]] = {}
    for index, (_, queries, first, last) in enumerate(table.tolist()):
        for link in map(tuple, links[first:last].tolist() if queries else []):
            if link[1]:
                readers_of.setdefault(link, []).append(index)
    ranges = sorted(readers_of)
    for (start, keys, _), (following, _, _) in itertools.pairwise(ranges):
        assert start + keys <= following, f"keys from {following} on belong to two ranges of the pack"
    positions = _first_positions(table, links)
    items: list[tuple[int, ...]] = []
    readers: list[tuple[int, ...]] = []
    sums: list[tuple[int, ...]] = []
    slots = 0
    for start, keys, position in ranges:
        groups = _groups(readers_of[start, keys, position], table, group, most_rows)
        bounds = []
        for members in groups:
            bounds.append((len(readers), len(readers) + len(members)))
            readers += [(*table[i, :2].tolist(), int(positions[i])) for i in members]
        for at in range(0, keys, block):
            if len(bounds) > 1:
                sums.append((start, keys, at, slots, slots + len(bounds)))
            for bound in bounds:
                items.append((start, keys, position, at, *bound, slots if len(bounds) > 1 else NO_SLOT))
                slots += len(bounds) > 1
    return KeyTiles(
        _int32(items, 7, device), _int32(readers, 3, device), _int32(sums, 5, device), slots,
        sum(keys for _, keys, _ in ranges),
    )  # fmt: skip


def _groups(members: list[int], table: Table, group: int, most_rows: int) -> list[list[int]]:
    """The segments that read a range, divided where their rows exceed the limit."""
    groups: list[list[int]] = [[]]
    rows = 0
    for index in members:
        count = int(table[index, 1]) * group
        if groups[-1] and rows + count > most_rows:
            groups.append([])
            rows = 0
        groups[-1].append(index)
        rows += count
    return groups


def _int32(rows: Any, columns: int, device: torch.device) -> Tensor:
    return upload(np.asarray(rows, np.int32).reshape(-1, columns), device)
