"""Attention over forests of segments in C++, forward and backward."""

from dataclasses import dataclass

import pytest
import torch

from peftdyno.kernels.attention import AttentionShape

SHAPES = {"grouped": (6, 2, 16), "single": (1, 1, 8), "odd": (3, 1, 9), "wide": (2, 2, 80), "nine": (9, 3, 64)}
"""Query heads, key heads, head width."""


@dataclass
class Forest:
    """A layout under construction: segments of tokens whose parents come before them."""

    segments: list
    chain: list
    paths: list
    rows: int = 0

    @classmethod
    def of(cls, lengths, parents, prefix=0):
        """Segments of `lengths` with parents (-1: none); a prefix of virtual keys before every root."""
        forest, total = cls([], [], []), sum(lengths)
        for length, parent in zip(lengths, parents, strict=True):
            root = [(total, prefix, 0)] if prefix else []
            path = list(forest.paths[parent]) if parent >= 0 else root
            position = sum(keys for _, keys, _ in path)
            path.append((forest.rows, length, position))
            forest.paths.append(path)
            first = len(forest.chain)
            forest.chain.extend(path)
            forest.segments.append((forest.rows, length, first, len(forest.chain)))
            forest.rows += length
        return forest

    def tables(self):
        def table(rows, columns):
            return torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)

        return table(self.segments, 4), table(self.chain, 3)


FORESTS = {
    "no-token": Forest.of([0, 0], [-1, 0]),
    "one-token": Forest.of([1], [-1]),
    "sequences": Forest.of([63, 1, 0, 127, 5], [-1] * 5),
    "shared": Forest.of([70, 9, 1, 33, 0], [-1, 0, 0, 0, 0]),
    "deep": Forest.of([3, 2, 1, 4, 70, 1, 2, 5], [-1, 0, 1, 2, 3, 4, 5, 2]),
    "two-trees": Forest.of([40, 11, 12, 66, 20], [-1, 0, 0, -1, 3]),
    "prefix": Forest.of([30, 70, 5], [-1, 0, -1], prefix=13),
    "empty-root": Forest.of([0, 17, 4], [-1, 0, 0]),
}


def tensors(forest, shape, dtype, extra):
    heads, key_heads, width = shape
    n = forest.rows
    qkv = torch.randn(n, (heads + 2 * key_heads) * width + 5).to(dtype)[:, : (heads + 2 * key_heads) * width]
    parts = qkv.unflatten(1, (heads + 2 * key_heads, width))
    q, k, v = parts[:, :heads], parts[:, heads : heads + key_heads], parts[:, heads + key_heads :]
    prefix = [torch.randn(extra, key_heads, width) for _ in range(2)] if extra else [None, None]
    return q, k, v, *prefix


def run(check, rows, forest, shape, dtype, window=0, softcap=0.0, gain=1.0):
    extra = max(0, max((row + keys for row, keys, _ in forest.chain), default=0) - forest.rows)
    inputs = tensors(forest, shape, dtype, extra)
    inputs = (inputs[0] * gain, *inputs[1:])
    options = (*forest.tables(), shape[2] ** -0.5, window, softcap, 8)
    out, lse = check("attention", *inputs, *options)
    assert out.stride(0) == shape[0] * shape[2] + 8
    dout = rows(forest.rows, shape[0] * shape[2], dtype, spare=3)
    check("attention_backward", dout, *inputs, out, lse, *options)


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
@pytest.mark.parametrize("shape", ["grouped", "nine"])
def test_forests(check, rows, dtype, forest, shape) -> None:
    run(check, rows, forest, SHAPES[shape], dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(check, rows, dtype, shape) -> None:
    run(check, rows, FORESTS["two-trees"], shape, dtype)


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_windows(check, rows, dtype, window) -> None:
    run(check, rows, FORESTS["shared"], SHAPES["grouped"], dtype, window=window)
    run(check, rows, FORESTS["sequences"], SHAPES["odd"], dtype, window=window)


def test_softcap(check, rows, dtype) -> None:
    run(check, rows, FORESTS["shared"], SHAPES["grouped"], dtype, softcap=5.0)
    run(check, rows, FORESTS["prefix"], SHAPES["grouped"], dtype, softcap=50.0, window=20)


def test_extreme_scores(check, rows, dtype) -> None:
    run(check, rows, FORESTS["sequences"], SHAPES["grouped"], dtype, gain=60.0)


@pytest.mark.parametrize("kind", ["plain", "softcap"])
def test_a_number_that_is_none_is_seen(isa, dtype, kind) -> None:
    """It reaches every query that sees its key and no other."""
    forest, (heads, key_heads, width) = FORESTS["sequences"], SHAPES["grouped"]
    q, k, v, *prefix = tensors(forest, SHAPES["grouped"], dtype, 0)
    start, queries, *_ = max(forest.segments, key=lambda segment: segment[1])
    key = start + queries // 2
    k[key, 0, 3] = float("nan")
    options = (*forest.tables(), 0.25, 0, 5.0 if kind == "softcap" else 0.0, 0)
    out, _ = torch.ops.peftdyno_cpu.attention(q, k, v, *prefix, *options)
    lost = out.unflatten(1, (heads, width)).isnan().all(2)
    expected = torch.zeros(forest.rows, heads, dtype=torch.bool)
    expected[key : start + queries, : heads // key_heads] = True
    assert torch.equal(lost, expected)


def test_heads_that_do_not_fit(isa) -> None:
    q, k = torch.ones(4, 3, 8), torch.ones(4, 2, 8)
    with pytest.raises(RuntimeError, match="3 query heads do not share 2 key heads"):
        torch.ops.peftdyno_cpu.attention(q, k, k, None, None, *FORESTS["sequences"].tables(), 0.25, 0, 0.0, 0)


@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_threads(check, rows, dtype, threads, threads_used) -> None:
    threads(threads_used)
    run(check, rows, FORESTS["two-trees"], SHAPES["nine"], dtype)


def test_backward_repeats_itself(isa, dtype) -> None:
    forest, shape = FORESTS["shared"], SHAPES["grouped"]
    inputs = tensors(forest, shape, dtype, 0)
    options = (*forest.tables(), 0.25, 0, 0.0, 0)
    out, lse = torch.ops.peftdyno_cpu.attention(*inputs, *options)
    dout = torch.randn(out.shape).to(dtype)
    first, again = (torch.ops.peftdyno_cpu.attention_backward(dout, *inputs, out, lse, *options)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_queries_at_the_end_of_cached_keys(check, dtype) -> None:
    """Decoding: fewer queries than keys, the last of which are their own, over a shared ancestor."""
    heads, key_heads, width = SHAPES["nine"]
    keys = [torch.randn(300, key_heads, width).to(dtype) for _ in range(2)]
    q = torch.randn(4, heads, width).to(dtype)
    segments = torch.tensor([[0, 1, 0, 2], [1, 1, 2, 4], [2, 2, 4, 6]], dtype=torch.int32)
    chain = torch.tensor(
        [[0, 100, 0], [100, 1, 100], [0, 100, 0], [101, 90, 100], [0, 100, 0], [200, 70, 100]], dtype=torch.int32
    )
    for window in (0, 50):
        check("attention", q, *keys, None, None, segments, chain, 0.125, window, 0.0, 0)


def cached(shape, dtype, queries, keys, prefix=0, gain=1.0):
    """Queries, keys and values with heads side by side in a row, as a cache has them, and a prefix of virtual keys."""
    heads, key_heads, width = shape
    q = (gain * torch.randn(queries, heads, width)).to(dtype)
    k, v = torch.randn(keys, 2, key_heads, width).to(dtype).unbind(1)
    virtual = [torch.randn(prefix, key_heads, width) if prefix else None for _ in range(2)]
    return q, k, v, *virtual


def single_queries(keys, prefix=0):
    """Tables of nine queries, each alone: after 150 shared keys and some of their own, or after a prefix, or alone."""
    links = [
        [(0, 150, 0), (150, 1, 150)],
        [(0, 150, 0), (160, 64, 150)],
        [(0, 150, 0), (230, 65, 150)],
        [(300, 1, 0)],
        [(301, 31, 0), (0, 17, 31)],
        [(340, 16, 0)],
        [(360, 130, 0)],
        [(keys, prefix, 0), (490, 5, prefix)] if prefix else [(490, 5, 0)],
        [(keys - 3, 3 + min(3, prefix), 0)],
    ]
    ends = [sum(map(len, links[: i + 1])) for i in range(len(links))]
    segments = [[i, 1, end - len(own), end] for i, (own, end) in enumerate(zip(links, ends, strict=True))]
    chain = [link for own in links for link in own]
    return torch.tensor(segments, dtype=torch.int32), torch.tensor(chain, dtype=torch.int32)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (7, 1, 32), (16, 2, 20)], ids=str)
@pytest.mark.parametrize("prefix", [0, 5])
def test_single_queries(check, dtype, shape, prefix) -> None:
    """Decoding, where no segment has more than one query."""
    inputs, tables = cached(shape, dtype, 9, 500, prefix), single_queries(500, prefix)
    check("attention", *inputs, *tables, shape[2] ** -0.5, 0, 0.0, 8)


@pytest.mark.parametrize("threads_used", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 1, 16, 100])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_single_queries_that_see_some(check, dtype, threads, threads_used, window, softcap) -> None:
    threads(threads_used)
    inputs = cached(SHAPES["nine"], dtype, 9, 500, gain=20.0)
    check("attention", *inputs, *single_queries(500), 0.125, window, softcap, 0)


def test_a_single_query_sees_a_number_that_is_none(isa, dtype) -> None:
    """Those do whose keys have it: a shared key reaches three and half their heads, a value reaches one."""
    q, k, v, *_ = cached((4, 2, 16), dtype, 9, 500)
    k[7, 0, 3], v[361, 1, 5] = float("nan"), float("nan")
    out, _ = torch.ops.peftdyno_cpu.attention(q, k, v, None, None, *single_queries(500), 0.25, 0, 0.0, 0)
    expected = torch.zeros(9, 4, 16, dtype=torch.bool)
    expected[[0, 1, 2, 4], :2] = True
    expected[6, 2:, 5] = True
    assert torch.equal(out.unflatten(1, (4, 16)).isnan(), expected)


def test_fused_rows_split_into_heads_even_where_there_are_none() -> None:
    heads, key_heads, width = SHAPES["grouped"]
    shape = AttentionShape(num_heads=heads, num_key_value_heads=key_heads, head_dim=width, scale=1.0)
    for n in (0, 3):
        q, k, v = shape.split(torch.randn(n, (heads + 2 * key_heads) * width))
        assert q.shape == (n, heads, width) and k.shape == v.shape == (n, key_heads, width)
