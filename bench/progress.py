"""What a job tells of its progress; this one is silent, the command line has one that draws bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

TrainProgress = Callable[[int, int, float, int], None]
"""(steps done, steps in all, mean loss, tokens of the step)."""
RowProgress = Callable[[int, int], None]
"""(rows done, rows in all)."""


class Progress:
    """Tells nobody."""

    @contextmanager
    def training(self, label: str) -> Iterator[TrainProgress]:
        """A callback for the steps of one training."""
        yield lambda done, total, loss, tokens: None

    @contextmanager
    def scoring(self, label: str) -> Iterator[RowProgress]:
        """A callback for the rows of one evaluation."""
        yield lambda done, total: None

    def say(self, text: str) -> None:
        """One line of news."""
