"""Attention over forests of segments: roots, shared and learned prefixes, windows, soft caps, cached keys."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import attention, replay
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.triton import attention as forward_kernels
from peftdyno.kernels.triton import attention_backward, load
from peftdyno.kernels.tuning import Tile


@dataclass(frozen=True)
class Forest:
    """Tables of a pack, its number of rows, and learned prefix keys behind them."""

    segments: tuple[tuple[int, int, int, int], ...]
    chain: tuple[tuple[int, int, int], ...]
    rows: int
    prefix: int = 0

    def tables(self) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor(self.segments, dtype=torch.int32).reshape(-1, 4),
            torch.tensor(self.chain, dtype=torch.int32).reshape(-1, 3),
        )


ONE = Forest(((0, 1, 0, 1),), ((0, 1, 0),), 1)
ROOTS = Forest(((0, 63, 0, 1), (63, 1, 1, 2), (64, 40, 2, 3)), ((0, 63, 0), (63, 1, 0), (64, 40, 0)), 104)
SHARED = Forest(
    ((0, 21, 0, 1), (21, 17, 1, 3), (38, 33, 3, 5), (71, 1, 5, 7)),
    ((0, 21, 0), (0, 21, 0), (21, 17, 21), (0, 21, 0), (38, 33, 21), (0, 21, 0), (71, 1, 21)),
    72,
)
LEARNED = Forest(
    ((0, 20, 0, 2), (20, 30, 2, 4), (50, 9, 4, 7)),
    ((59, 5, 0), (0, 20, 5), (64, 5, 0), (20, 30, 5), (64, 5, 0), (20, 30, 5), (50, 9, 35)),
    59,
    15,
)
"""Two runs' prefixes of five keys and an unused third; the last segment is a child of the second."""


@dataclass(frozen=True)
class Shape:
    """Heads, key heads, width of a head, window, soft cap."""

    heads: int
    key_heads: int
    d: int
    window: int = 0
    softcap: float = 0.0


CASES = [
    (ONE, Shape(1, 1, 16), torch.float16),
    (ROOTS, Shape(4, 2, 16), torch.float16),
    (ROOTS, Shape(3, 1, 10, window=7), torch.float32),
    (SHARED, Shape(2, 1, 16), torch.float32),
    (SHARED, Shape(2, 1, 20, window=30, softcap=5.0), torch.float32),
    (LEARNED, Shape(3, 1, 8, window=12), torch.float16),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough for several of each kind in a small pack."""
    tile = Tile(16, 16, 4, 2)
    monkeypatch.setattr(forward_kernels, "tile", lambda *_: tile)
    monkeypatch.setattr(attention_backward, "query_tile", lambda *_: tile)
    monkeypatch.setattr(attention_backward, "key_tile", lambda *_: tile)


def inputs(forest: Forest, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    heads = shape.heads + 2 * shape.key_heads
    qkv = torch.randn(forest.rows, heads, shape.d, device=device).to(dtype)
    q, k, v = qkv.split([shape.heads, shape.key_heads, shape.key_heads], dim=1)
    prefix = [torch.randn(forest.prefix, shape.key_heads, shape.d, device=device) for _ in range(2)]
    return q, k, v, *(prefix if forest.prefix else (None, None))


def agree(name: str, reference: Any, arguments: tuple[Any, ...]) -> Any:
    result = load(name)(*arguments)
    lines = excess(name, result, reference(*arguments), in_float64(reference, arguments))
    assert not lines, lines
    return result


def both(forest: Forest, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    tensors, tables = inputs(forest, shape, dtype, device), forest.tables()
    options = (shape.d**-0.5, shape.window, shape.softcap, 3)
    out, lse = agree("attention", attention.reference_forward, (*tensors, *tables, *options))
    assert out.stride(0) == shape.heads * shape.d + 3
    dout = with_spare(forest.rows, shape.heads * shape.d, 2, out)
    dout.copy_(torch.randn(forest.rows, shape.heads * shape.d))
    arguments = (dout, *tensors, out, lse, *tables, *options)
    agree("attention_backward", attention.reference_backward, arguments)


@pytest.mark.parametrize("case", CASES)
def test_attention(case: tuple[Forest, Shape, torch.dtype], device: Any, small_tiles: None) -> None:
    both(*case, device)


def test_attention_with_the_tiles_of_training(device: Any) -> None:
    both(SHARED, Shape(4, 2, 16), torch.float32, device)


def test_keys_with_many_readers_are_summed_in_parts(
    device: Any, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backward, "MOST_ROWS", 20)
    both(LEARNED, Shape(2, 1, 16), torch.float32, device)


CACHED = Forest(((0, 1, 0, 2), (1, 3, 2, 4)), ((100, 37, 0), (0, 50, 37), (100, 37, 0), (50, 41, 37)), 150)
"""Decoding: queries at the end of their keys, behind a prefix that both share."""


@pytest.mark.parametrize(
    ("window", "piece", "dtype"),
    [(0, 0, torch.float16), (0, 16, torch.float32), (45, 16, torch.float16)],
)
def test_decoding(window: int, piece: int, dtype: torch.dtype, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_kernels, "_piece", lambda *_: piece)
    shape = Shape(6, 2, 16, window)
    k, v = (torch.randn(CACHED.rows, shape.key_heads, shape.d, device=device).to(dtype) for _ in range(2))
    q = torch.randn(4, shape.heads, shape.d, device=device).to(dtype)
    agree("attention", attention.reference_forward, (q, k, v, None, None, *CACHED.tables(), 0.3, window, 0.0, 0))


def test_gradients_have_the_same_bits_twice(device: Any, small_tiles: None) -> None:
    tensors, tables = inputs(SHARED, Shape(1, 1, 16), torch.float32, device), SHARED.tables()
    out, lse = load("attention")(*tensors, *tables, 0.25, 0, 0.0, 0)
    first, second = (
        load("attention_backward")(torch.ones_like(out), *tensors, out, lse, *tables, 0.25, 0, 0.0, 0) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("window", "divided"), [(0, False), (0, True), (7, True)])
def test_recorded_work_lists_are_filled_anew(
    window: int, divided: bool, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoding step whose layout changes in place: each replay equals the reference on the layout as it is then."""
    if divided:
        monkeypatch.setattr(forward_kernels, "PIECE", 8)
        monkeypatch.setattr(forward_kernels, "_piece", lambda *_: 8)
    q = torch.randn(3, 2, 16, device=device)
    k, v = (torch.randn(60, 1, 16, device=device) for _ in range(2))
    segments, chain = torch.zeros(3, 4, dtype=torch.int32), torch.zeros(6, 3, dtype=torch.int32)
    tables = replay.Tables()
    options = (0.3, window, 0.0, 0)
    for lengths in ((12, 12, 12), (9, 4)):
        chain.zero_()
        rows = []
        for i, length in enumerate(lengths):
            chain[2 * i : 2 * i + 2] = torch.tensor([[0, 20, 0], [24 + 12 * i, length, 20]])
            rows.append([i, 1, 2 * i, 2 * i + 2])
        if len(lengths) == 2:  # the last row is padding, which sees one key of nobody's
            chain[4] = torch.tensor([23, 1, 0])
            rows.append([2, 1, 4, 5])
        segments.copy_(torch.tensor(rows))
        tables.fill()
        with replay.recording(tables):
            out, lse = forward_kernels.forward(q, k, v, None, None, segments, chain, *options)
        arguments = (q, k, v, None, None, segments.clone(), chain.clone(), *options)
        truth = in_float64(attention.reference_forward, arguments)
        assert not excess("replayed", (out, lse), attention.reference_forward(*arguments), truth)
    assert len(tables.fills) == 1


FOLLOWING = (
    Forest(((0, 59, 0, 2),), ((59, 5, 0), (0, 59, 5)), 59, 15),
    Forest(
        ((0, 8, 0, 2), (8, 40, 2, 5), (48, 10, 5, 8), (58, 1, 8, 9)),
        ((69, 5, 0), (0, 8, 5), (69, 5, 0), (0, 8, 5), (8, 40, 13), (69, 5, 0), (0, 8, 5), (48, 10, 13), (58, 1, 0)),
        59,
        15,
    ),
)
"""Layouts of as many rows as LEARNED: one sequence, and a shared beginning of two behind another run's prefix."""


@pytest.mark.parametrize(("most_rows", "window"), [(16384, 0), (20, 12)])
def test_a_recorded_step_takes_any_layout_of_its_size(
    most_rows: int, window: int, device: Any, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step recorded with one layout, then filled with others in place: each equals the reference on its own."""
    monkeypatch.setattr(attention_backward, "MOST_ROWS", most_rows)
    shape, recorded = Shape(2, 1, 16, window), replay.Tables(any_layout=True)
    segments, chain = torch.zeros(6, 4, dtype=torch.int32), torch.zeros(12, 3, dtype=torch.int32)
    for forest in (LEARNED, *FOLLOWING, LEARNED):
        for table, rows in zip((segments, chain), forest.tables(), strict=True):
            table.zero_()
            table[: len(rows)] = rows
        segments[len(forest.segments) :, 3] = 1
        recorded.fill()
        tensors, options = inputs(forest, shape, torch.float32, device), (0.3, window, 0.0, 0)
        arguments = (*tensors, segments.clone(), chain.clone(), *options)
        with replay.recording(recorded):
            out, lse = forward_kernels.forward(*tensors, segments, chain, *options)
            more = (torch.randn(out.shape).to(device), *tensors, out, lse)
            gradients = attention_backward.backward(*more, segments, chain, *options)
        truth = in_float64(attention.reference_forward, arguments)
        assert not excess("replayed", (out, lse), attention.reference_forward(*arguments), truth)
        arguments = (*more, *arguments[5:])
        truth = in_float64(attention.reference_backward, arguments)
        assert not excess("replayed", gradients, attention.reference_backward(*arguments), truth)
    assert len(recorded.fills) == 2, "one list of queries for both directions, one of keys"
