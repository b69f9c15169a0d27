"""A section of the page, and how its figures are put in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..pscp import Exponents


@dataclass(frozen=True)
class Table:
    """A table of strings; the first column is text, the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A title and its paragraphs and tables."""

    title: str
    blocks: Sequence[str | Table]


def setting(exponents: Exponents) -> str:
    """The exponents of parameters, FLOPs and memory."""
    return f"{exponents.parameters:g} {exponents.tflop:g} {exponents.memory_gb:g}"


def by_rank(values: dict[str, float]) -> list[str]:
    """The methods, highest value first."""
    return sorted(values, key=lambda method: -values[method])


def names(items: Sequence[str]) -> str:
    """A list in words."""
    return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1] if items else "none"
