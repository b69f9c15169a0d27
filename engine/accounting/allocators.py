"""What an allocator grants for a request: on a CPU what was asked for; on CUDA a block of PyTorch's caching allocator,
whose rules are those of c10/cuda/CUDACachingAllocator.cpp at its default settings, on one stream.

A CUDA block may be larger than the request, and segments that the allocator holds are more than the blocks in use.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

MIB = 1 << 20
GRAIN = 512
"""Bytes that a request is rounded up to a multiple of."""
SMALL = MIB
"""Most bytes of a request that is served from the pool of small blocks."""
SMALL_SEGMENT, SEGMENT, SEGMENT_GRAIN = 2 * MIB, 20 * MIB, 2 * MIB
LARGE = 10 * MIB
"""From here on a request has a segment of its own size, rounded up."""


def granted(nbytes: int) -> int:
    """Bytes of the smallest CUDA block for a request."""
    return max(GRAIN, -(-nbytes // GRAIN) * GRAIN)


@dataclass(eq=False)
class Grant:
    """A block in use or free, with the blocks beside it in its segment."""

    nbytes: int
    small: bool = False
    address: int = 0
    free: bool = False
    before: Grant | None = None
    after: Grant | None = None


class Allocator(Protocol):
    """Grants memory and takes it back; `reserved`: bytes taken from the device."""

    reserved: int

    def grant(self, nbytes: int) -> Grant:
        """A block for a request."""

    def release(self, grant: Grant) -> None:
        """Take a block back."""


class PlainAllocator:
    """Grants what was asked for."""

    def __init__(self) -> None:
        self.reserved = 0

    def grant(self, nbytes: int) -> Grant:
        """A block of just this size."""
        self.reserved += nbytes
        return Grant(nbytes)

    def release(self, grant: Grant) -> None:
        """Return it to the system."""
        self.reserved -= grant.nbytes


class CachingAllocator:
    """Best fit among free blocks, the lowest address of those; what is left over is split off unless it is little;
    neighbours merge when freed. Segments are never returned, and lie behind one another.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, Grant]]] = {True: [], False: []}

    def grant(self, nbytes: int) -> Grant:
        """A block of at least this size."""
        if nbytes == 0:
            return Grant(0)
        size = granted(nbytes)
        grant = self._best_fit(size) or self._segment(size)
        self._split(grant, size)
        grant.free = False
        return grant

    def release(self, grant: Grant) -> None:
        """Free a block, joined with free neighbours."""
        if grant.nbytes == 0:
            return
        if grant.before is not None and grant.before.free:
            self._absorb(grant, grant.before)
            grant.address = grant.before.address
            grant.before = grant.before.before
            if grant.before is not None:
                grant.before.after = grant
        if grant.after is not None and grant.after.free:
            self._absorb(grant, grant.after)
            grant.after = grant.after.after
            if grant.after is not None:
                grant.after.before = grant
        self._keep(grant)

    def _best_fit(self, size: int) -> Grant | None:
        pool = self._free[size <= SMALL]
        place = bisect_left(pool, size, key=lambda entry: entry[0])
        return pool.pop(place)[2] if place < len(pool) else None

    def _segment(self, size: int) -> Grant:
        small = size <= SMALL
        whole = SMALL_SEGMENT if small else SEGMENT if size < LARGE else -(-size // SEGMENT_GRAIN) * SEGMENT_GRAIN
        self.reserved += whole
        return Grant(whole, small, address=self.reserved - whole)

    def _split(self, grant: Grant, size: int) -> None:
        rest = grant.nbytes - size
        if rest < GRAIN if grant.small else rest <= SMALL:
            return
        grant.nbytes = size
        spare = Grant(rest, grant.small, grant.address + size, before=grant, after=grant.after)
        if grant.after is not None:
            grant.after.before = spare
        grant.after = spare
        self._keep(spare)

    def _keep(self, grant: Grant) -> None:
        grant.free = True
        insort(self._free[grant.small], (grant.nbytes, grant.address, grant), key=lambda entry: entry[:2])

    def _absorb(self, grant: Grant, other: Grant) -> None:
        pool = self._free[other.small]
        pool.pop(bisect_left(pool, (other.nbytes, other.address), key=lambda entry: entry[:2]))
        grant.nbytes += other.nbytes


def allocator(device: str) -> Allocator:
    """That of a type of device."""
    return CachingAllocator() if device == "cuda" else PlainAllocator()
