"""memory.html: live memory over the operations of a step, and what was alive at the peak; needs no other file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from peftdyno.engine.accounting.memory import CATEGORIES, Block, MemoryLog
from peftdyno.engine.atomic import whole_file

WIDTH, HEIGHT, LEFT, BOTTOM = 960, 300, 70, 30
POINTS = 600
"""Operations drawn at most; of the rest the highest of each group is."""
COLOURS = dict(
    zip(
        CATEGORIES,
        ("#4472a8", "#e08a3c", "#c75a5a", "#7aa65a", "#8e6bb0", "#a3846b", "#d07fb0", "#8a8f98", "#b9b13f"),
        strict=True,
    )
)


def write_memory_page(log: MemoryLog, path: Path, title: str) -> None:
    """Write the page; `title` says of what."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath("memory.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(**_values(log, title))
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _values(log: MemoryLog, title: str) -> dict[str, Any]:
    at = log.moments[log.peak_index]
    alive = sorted(log.alive(log.peak_index), key=lambda block: -block.nbytes)
    return {
        "title": title,
        "peak": log.peak_bytes,
        "at": at,
        "index": log.peak_index,
        "count": len(log.moments),
        "categories": log.by_category(log.peak_index),
        "colours": COLOURS,
        "timeline": timeline(log),
        "treemap": treemap(alive),
        "largest": alive[:40],
    }


def timeline(log: MemoryLog) -> str:
    """Stacked areas of the categories as SVG."""
    curves, count = log.curves(), len(log.moments)
    step = max(1, -(-count // POINTS))
    chosen = [max(range(i, min(i + step, count)), key=lambda j: log.moments[j].live) for i in range(0, count, step)]
    top = max(log.peak_bytes, 1)
    xs = [LEFT + (WIDTH - LEFT) * i / max(len(chosen) - 1, 1) for i in range(len(chosen))]
    below, parts = [0] * len(chosen), []
    for name, curve in curves.items():
        above = [b + curve[i] for b, i in zip(below, chosen, strict=True)]
        parts.append(_area(xs, below, above, top, COLOURS[name], f"{name}: at most {max(curve) / 1e6:,.1f} MB"))
        below = above
    labels = [_label(LEFT - 6, _y(share * top, top) + 4, f"{share * top / 1e6:,.0f} MB") for share in (0, 0.5, 1)]
    parts += [*labels, *_phases(log, chosen, xs)]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + BOTTOM}" role="img">{"".join(parts)}</svg>'


def _phases(log: MemoryLog, chosen: Sequence[int], xs: Sequence[float]) -> list[str]:
    """A line and a name where each phase begins."""
    parts, before = [], ""
    for index, x in zip(chosen, xs, strict=True):
        phase = log.moments[index].phase
        if phase != before:
            parts.append(f'<path class="line" d="M{x:.1f} 0V{HEIGHT}"/>')
            parts.append(f'<text x="{x + 3:.1f}" y="{HEIGHT + 18}">{escape(phase)}</text>')
        before = phase
    return parts


def _y(value: float, top: float) -> float:
    return HEIGHT - (HEIGHT - 12) * value / top


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end">{text}</text>'


def _area(xs: Sequence[float], below: Sequence[int], above: Sequence[int], top: float, colour: str, tip: str) -> str:
    points = [*zip(xs, above, strict=True), *reversed(list(zip(xs, below, strict=True)))]
    path = "L".join(f"{x:.1f} {_y(value, top):.1f}" for x, value in points)
    return f'<path fill="{colour}" d="M{path}Z"><title>{escape(tip)}</title></path>'


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def treemap(blocks: Iterable[Block]) -> str:
    """Live memory as nested rectangles: categories, and in each the layers."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for block in blocks:
        groups[block.category][_where(block)] += block.nbytes
    totals = {name: sum(parts.values()) for name, parts in groups.items()}
    rectangles = []
    for name, box in _divide(totals, _Box(0, 0, WIDTH, HEIGHT)).items():
        for part, inner in _divide(groups[name], box).items():
            rectangles.append(_rectangle(inner, COLOURS[name], name, part, groups[name][part]))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(rectangles)}</svg>'


def _where(block: Block) -> str:
    return block.operator if block.layer < 0 and block.operator else f"layer {block.layer}" if block.layer >= 0 else ""


def _divide(sizes: dict[str, int], box: _Box) -> dict[str, _Box]:
    """Split a box by sizes: halves of like weight along the longer side, again and again."""
    items = sorted(((name, size) for name, size in sizes.items() if size), key=lambda item: -item[1])
    return dict(_split(items, box))


def _split(items: list[tuple[str, int]], box: _Box) -> list[tuple[str, _Box]]:
    if len(items) <= 1:
        return [(name, box) for name, _ in items]
    total, first, cut = sum(size for _, size in items), 0, 0
    while cut < len(items) - 1 and (cut == 0 or first + items[cut][1] <= total / 2):
        first += items[cut][1]
        cut += 1
    share = first / total
    if box.width >= box.height:
        halves = (
            _Box(box.x, box.y, box.width * share, box.height),
            _Box(box.x + box.width * share, box.y, box.width * (1 - share), box.height),
        )
    else:
        halves = (
            _Box(box.x, box.y, box.width, box.height * share),
            _Box(box.x, box.y + box.height * share, box.width, box.height * (1 - share)),
        )
    return _split(items[:cut], halves[0]) + _split(items[cut:], halves[1])


def _rectangle(box: _Box, colour: str, category: str, part: str, nbytes: int) -> str:
    tip = escape(f"{category}{', ' if part else ''}{part}: {nbytes / 1e6:,.2f} MB")
    name = escape(part or category)
    text = f'<text x="{box.x + 4:.1f}" y="{box.y + 14:.1f}">{name}</text>' if box.width > 60 and box.height > 18 else ""
    return (
        f'<g><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'fill="{colour}"/>{text}<title>{tip}</title></g>'
    )
