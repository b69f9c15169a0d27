"""One tape for calls of many sizes: recorded at a few of them, repeated at others.

A call that depends on its inputs by nothing but their sizes is the same operators every time, and an integer among
their arguments is either the same too, or one of the sizes, or a multiple of one, as where rows begin in memory. Which
it is follows from what all recordings have in common. Where they leave open which of two it is and both differ at new
sizes, the call must be recorded there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from peftdyno.engine.tape import HOLE, NOWHERE, Call, Heard, Repeated

Place = tuple[int, int, int, int]
"""An integer of a recorded call, as csrc/cpu/tape.h has it: the call; NOWHERE, its argument and the element or NOWHERE;
or an input, SIZES, STRIDES or OFFSET of how it lies, and the dimension."""
Meaning = tuple[int, int]
"""Which of the sizes times how much; (NOWHERE, its value) for one that is always the same."""
SIZES, STRIDES, OFFSET = range(3)


class SizedTape:
    """A recorded call that can be repeated at other sizes."""

    def __init__(self, heard: Heard, sizes: Sequence[int]) -> None:
        self.heard = heard
        self.meanings = {place: _meanings(place, value, sizes) for place, value in _integers(heard.calls)}
        self.num_checked = 0
        self._build()

    def learn(self, heard: Heard, sizes: Sequence[int]) -> bool:
        """Take the same call at other sizes into account. False where it is another call; RuntimeError where an integer
        is none of those that it could be."""
        calls = zip_longest(self.heard.calls, heard.calls)
        if any(ours is None or theirs is None or _fixed(ours) != _fixed(theirs) for ours, theirs in calls):
            return False
        for place, value in _integers(heard.calls):
            kept = frozenset(m for m in self.meanings[place] if _value(m, sizes) == value)
            if not kept:
                operator = heard.calls[place[0]].operator
                raise RuntimeError(f"{operator} has an argument that depends on the batch, and not by its sizes alone")
            self.meanings[place] = kept
        self._build()
        return True

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether it is known what the call is at some sizes."""
        return self._values(sizes) is not None

    def at(self, sizes: Sequence[int], given: Sequence[Tensor]) -> Repeated:
        """The call at sizes that fit, on other tensors."""
        values = self._values(sizes)
        assert values is not None, "the sizes fit"
        self.repeated.tape.resize(values)
        self.repeated.tape.take(list(given))
        return self.repeated

    def _values(self, sizes: Sequence[int]) -> list[int] | None:
        values = []
        for group in self.groups:
            possible = {_value(meaning, sizes) for meaning in group}
            if len(possible) != 1:
                return None
            values.append(possible.pop())
        return values

    def _build(self) -> None:
        """The tape, and its integers that are not always the same, together where they can be the same sizes."""
        places: dict[frozenset[Meaning], list[Place]] = {}
        for place, meanings in self.meanings.items():
            if any(size != NOWHERE for size, _ in meanings):
                places.setdefault(meanings, []).append(place)
        self.groups = list(places)
        self.repeated = self.heard.repeated()
        for group in places.values():
            self.repeated.tape.add_size(group)


def _value(meaning: Meaning, sizes: Sequence[int]) -> int:
    size, factor = meaning
    return factor if size == NOWHERE else sizes[size] * factor


def _meanings(place: Place, value: int, sizes: Sequence[int]) -> frozenset[Meaning]:
    """What an integer may be; only where rows begin in memory is it a multiple."""
    rows = place[1] != NOWHERE and place[2] == OFFSET
    found = {(NOWHERE, value)} | {(i, 1) for i, size in enumerate(sizes) if size == value}
    if rows:
        found |= {(i, value // size) for i, size in enumerate(sizes) if 0 < size < value and value % size == 0}
    return frozenset(found)


def _integers(calls: Sequence[Call]) -> Iterator[tuple[Place, int]]:
    """The integers of all calls, in an order that is the same for the same calls."""
    for i, call in enumerate(calls):
        for a, argument in enumerate(call.args):
            parts = enumerate(argument) if isinstance(argument, list) else [(NOWHERE, argument)]
            yield from (((i, NOWHERE, a, element), part) for element, part in parts if _integer(part))
        for k, (*_, view) in enumerate(call.inputs):
            if view is None:
                continue
            for part, numbers in zip((SIZES, STRIDES), view[:2], strict=True):
                yield from (((i, k, part, d), number) for d, number in enumerate(numbers))
            yield (i, k, OFFSET, NOWHERE), view[2]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fixed(call: Call) -> tuple[Any, ...]:
    """A call without its integers and without what lies in its tensors."""
    inputs = [(*where, None if view is None else len(view[0])) for *where, view in call.inputs]
    named = {name: _without(value) for name, value in call.kwargs.items()}
    return call.operator, [_without(value) for value in call.args], named, inputs, call.outputs


def _without(value: Any) -> Any:
    if isinstance(value, list):
        return [_without(part) for part in value]
    if isinstance(value, Tensor):
        return "of the tape" if value is HOLE else (value.data_ptr(), value.shape, value.stride(), value.dtype)
    return int if _integer(value) else value
