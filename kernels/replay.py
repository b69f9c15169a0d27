"""What a recorded sequence of kernels needs to be replayed: the tables it read stay where they are and stay alive, and
those that say what is attended to are filled anew before each replay.

Kernels keep their tables in caches from which they may vanish; a recorded launch knows only their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass
class Tables:
    """Tables of one recording: those to keep alive; those that change, and how to bring them up to date, by name.

    `any_layout`: whether what is attended to may become any layout of the same numbers of rows, segments and links, as
    between training steps; else a layout only ends sooner than the first, as while decoding.
    """

    any_layout: bool = False
    kept: list[Any] = field(default_factory=list)
    plans: dict[Any, Any] = field(default_factory=dict)
    fills: list[Callable[[], None]] = field(default_factory=list)

    def fill(self) -> None:
        """Bring every changing table up to date, where it lies."""
        for fill in self.fills:
            fill()


_recording: list[Tables] = []


@contextmanager
def recording(tables: Tables) -> Iterator[None]:
    """Within it, the tables that kernels use are noted in `tables`."""
    _recording.append(tables)
    try:
        yield
    finally:
        _recording.pop()


def active() -> Tables | None:
    """The recording under way."""
    return _recording[-1] if _recording else None


def keep(value: T) -> T:
    """The value, kept alive by the recording under way."""
    if _recording:
        _recording[-1].kept.append(value)
    return value


def put(target: Tensor, source: Tensor) -> None:
    """Copy from the CPU, where a recording reads it, without waiting for what runs on the device."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
