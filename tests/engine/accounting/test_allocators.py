"""PyTorch's caching allocator, by its rules: sizes of segments, what is split off, what is used again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftdyno.engine.accounting.allocators import MIB, CachingAllocator, PlainAllocator, granted


@pytest.mark.parametrize(
    ("asked", "block", "segment"),
    [
        (1, 512, 2 * MIB), (512, 512, 2 * MIB), (513, 1024, 2 * MIB), (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB), (9 * MIB, 9 * MIB, 20 * MIB), (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB), (11 * MIB - 512, 11 * MIB - 512, 12 * MIB), (0, 0, 0),
    ],
)  # fmt: skip
def test_a_first_request(asked: int, block: int, segment: int) -> None:
    """A large block keeps what is left of its segment where that is a megabyte or less."""
    allocator = CachingAllocator()
    assert (allocator.grant(asked).nbytes, allocator.reserved) == (block, segment)


def test_the_smallest_free_block_that_fits_is_used_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.grant(size * MIB) for size in (40, 20, 30)]
    for block in blocks:
        allocator.release(block)
    assert allocator.grant(18 * MIB).nbytes == 18 * MIB  # of the 20; the other two are split off
    assert allocator.grant(29 * MIB).nbytes == 30 * MIB  # one left over stays in the block
    assert allocator.reserved == 90 * MIB


def test_neighbours_merge() -> None:
    allocator = CachingAllocator()
    parts = [allocator.grant(6 * MIB) for _ in range(3)]  # of one segment of 20, two left over
    assert allocator.reserved == 20 * MIB
    for part in (parts[0], parts[2], parts[1]):
        allocator.release(part)
    assert allocator.grant(9 * MIB).nbytes == 9 * MIB
    assert allocator.reserved == 20 * MIB


def test_small_and_large_blocks_do_not_mix() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.grant(30 * MIB))
    allocator.grant(1000)
    assert allocator.reserved == 32 * MIB


@given(st.lists(st.tuples(st.integers(0, 40 * MIB), st.booleans()), max_size=60))
def test_blocks_hold_what_was_asked_and_never_overlap(requests: list[tuple[int, bool]]) -> None:
    allocator, plain, live = CachingAllocator(), PlainAllocator(), []
    for asked, free_one in requests:
        grant = allocator.grant(asked)
        assert asked <= grant.nbytes <= granted(asked) + MIB
        assert plain.grant(asked).nbytes == asked
        live.append(grant)
        if free_one:
            allocator.release(live.pop(len(live) // 2))
    ends = sorted((grant.address, grant.address + grant.nbytes) for grant in live if grant.nbytes)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
    assert sum(grant.nbytes for grant in live) <= allocator.reserved
    for grant in live:
        allocator.release(grant)
    reserved = allocator.reserved
    assert all(not grant.nbytes or grant.free for grant in live)
    whole = [entry for pool in allocator._free.values() for entry in pool]
    assert sum(nbytes for nbytes, _, _ in whole) == reserved
