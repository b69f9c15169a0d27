"""Plots as SVG text: bars with intervals, and points; colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT = 510, 110, 50
BAR, GAP = 22, 10
LETTER, LINE = 7, 13
"""Width of a letter of a name, and height of a line, about."""
PLACES = (-7, 17, 31, 45)
"""How far below its point a name may stand, the first that is free."""


@dataclass(frozen=True)
class Bar:
    """A value from 0 on, with an interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """x and y of a named thing."""

    name: str
    x: float
    y: float


def bars(items: Sequence[Bar], label: str) -> str:
    """Horizontal bars, the interval as a line across the end of each."""
    most = max((max(item.value, item.high or 0.0) for item in items), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / _round_up(most)
    height = len(items) * (BAR + GAP) + GAP + 34
    parts = [_axis_x(_ticks(0.0, _round_up(most)), scale, 0.0, height - 34, label)]
    for i, item in enumerate(items):
        y = GAP + i * (BAR + GAP)
        parts.append(_text(LEFT - 8, y + BAR / 2 + 4, item.name, "end"))
        parts.append(f'<rect class="bar" x="{LEFT}" y="{y}" width="{item.value * scale:.1f}" height="{BAR}" rx="2"/>')
        end = item.value if item.high is None else item.high
        parts.append(_text(LEFT + end * scale + 8, y + BAR / 2 + 4, f"{item.value:.1f}", "start"))
        if item.low is not None and item.high is not None:
            a, b, middle = LEFT + item.low * scale, LEFT + item.high * scale, y + BAR / 2
            parts.append(f'<path class="whisker" d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {y + 5}V{y + BAR - 5}'
                         f'M{b:.1f} {y + 5}V{y + BAR - 5}"/>')  # fmt: skip
    return _svg(height, parts, label)


def points(items: Sequence[Point], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Named points; `logarithmic` spreads x by powers of ten, for which every x must be positive."""
    height, top, bottom = 320, 16, 44
    xs = [math.log10(item.x) if logarithmic else item.x for item in items]
    x_low, x_high = _range(xs)
    y_low, y_high = _range([item.y for item in items])
    across, up = (WIDTH - LEFT - RIGHT) / (x_high - x_low), (height - top - bottom) / (y_high - y_low)
    ticks = _powers(x_low, x_high) if logarithmic else _ticks(x_low, x_high)
    names = [_short(10**tick) for tick in ticks] if logarithmic else None
    parts = [_axis_x(ticks, across, x_low, height - bottom, x_label, names)]
    for tick in _ticks(y_low, y_high):
        y = height - bottom - (tick - y_low) * up
        parts += [
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>',
            _text(LEFT - 8, y + 4, f"{tick:g}", "end"),
        ]
    parts.append(_text(14, top, y_label, "start"))
    taken: list[tuple[float, float, float]] = []
    for item, x in zip(items, xs, strict=True):
        cx, cy = LEFT + (x - x_low) * across, height - bottom - (item.y - y_low) * up
        parts.append(f'<circle class="dot" cx="{cx:.1f}" cy="{cy:.1f}" r="5"/>')
        side = -9 if cx > WIDTH - RIGHT - 90 else 9
        long = LETTER * len(item.name)
        start = cx + side - (long if side < 0 else 0)
        down = next((d for d in PLACES if _is_free(start, start + long, cy + d, taken)), PLACES[0])
        taken.append((start, start + long, cy + down))
        parts.append(_text(cx + side, cy + down, item.name, "end" if side < 0 else "start"))
    return _svg(height, parts, f"{y_label} by {x_label}")


def _is_free(start: float, end: float, y: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    """Whether a name from `start` to `end` at height y keeps clear of those that are there."""
    return all(end < a or start > b or abs(y - at) >= LINE for a, b, at in taken)


def _axis_x(
    ticks: Sequence[float], scale: float, start: float, y: float, label: str, names: Sequence[str] | None = None
) -> str:
    parts = []
    for i, tick in enumerate(ticks):
        x = LEFT + (tick - start) * scale
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{y}"/>')
        parts.append(_text(x, y + 15, names[i] if names else f"{tick:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, y + 31, label, "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" width="{WIDTH}">'
    return head + "".join(parts) + "</svg>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range with room around the values, never empty."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or max(abs(high) * 0.1, 0.5)
    return low - room, high + room


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten that is divided well by ticks."""
    step = _step(value)
    return step * math.ceil(value / step - 1e-9)


def _step(span: float) -> float:
    power = 10 ** math.floor(math.log10(span / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)


def _powers(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2, 5 times the powers of ten in a range, or of the powers alone where those are enough."""
    whole = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 3) if high - low > 1 else (1, 2, 5)
    found = [power + math.log10(factor) for power in whole for factor in factors]
    return [tick for tick in found if low <= tick <= high]


def _short(value: float) -> str:
    """30000 as 30k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.999 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    step = _step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
