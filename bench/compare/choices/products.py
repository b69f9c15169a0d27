"""The library's product against the program's own operators at the shapes of a step and of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from peftdyno.bench.compare.choices.lines import Line, Values, giga, rounds
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.turns import Measure, in_turns, timed
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.weights import field_shape
from peftdyno.kernels import cpu, linear
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.panels import drop_panels, keep_panels, panel_bytes
from peftdyno.kernels.workspace import own_product

Product = Callable[[Tensor, Tensor], Tensor]
OVER = (("operator", "library"),)
CACHE_LINE = 64
"""Bytes."""
HEAD_CALLS = 3
"""Calls of a round where one takes long."""


def products(setting: Setting) -> list[Line]:
    """Forward and backward with a different weight each time, few rows, the head, and rows of a new number."""
    sizes = setting.sizes
    rows = sizes.batch * sizes.length
    lines = []
    for site in SITES:
        weights = _weights(setting, site)
        for count in (sizes.length, rows):
            lines += _step_lines(site, count, weights, setting.repeats)
        lines.append(_panel_line(site, sizes.few_rows, weights, setting.repeats))
    return [*lines, *_head_lines(setting, rows), *_new_lines(setting)]


def _weights(setting: Setting, site: str) -> list[Tensor]:
    """As many different weights [out, in] of a site as are gone through."""
    shape = field_shape(setting.config, site)
    return [torch.randn(shape).to(torch.bfloat16) for _ in range(setting.sizes.copies)]


def _step_lines(site: str, rows: int, weights: Sequence[Tensor], repeats: int) -> list[Line]:
    """y = x W^T and dx = dy W by library and operator."""
    out, depth = weights[0].shape
    x, dy = (torch.randn(rows, n).to(torch.bfloat16) for n in (depth, out))
    lines = []
    for direction, left, columns, library, operator in (
        ("forward", x, out, _library_forward, _operator_forward),
        ("dx", dy, depth, torch.mm, linear.BACKWARD),
    ):
        measures = {
            "library": _measure(library, left, weights),
            "operator": _measure(operator, left, weights, later=True),
        }
        what = f"{direction} {rows} x {left.shape[1]} x {columns}; {_own(left, columns)}"
        cells = _rates(measures, len(weights), repeats)
        lines.append(Line(name=f"{direction}_{site}_{rows}", what=what, unit="GFLOP/s", cells=cells, over=OVER))
    return lines


def _head_lines(setting: Setting, rows: int) -> list[Line]:
    """Logits, and dx of the head with rows some bytes apart, as the loss lays them: where they are a multiple of a
    kibibyte long they otherwise fall on the same few lines of the first-level cache."""
    config = setting.config
    head = torch.randn(config.vocab_size, config.hidden_size).to(torch.bfloat16)
    x = torch.randn(rows, config.hidden_size).to(torch.bfloat16)
    dy = with_spare(rows, config.vocab_size, CACHE_LINE // head.element_size(), head).normal_()
    lines = []
    for direction, left, columns, library, operator in (
        ("forward", x, config.vocab_size, _library_forward, _operator_forward),
        ("dx", dy, config.hidden_size, torch.mm, linear.BACKWARD),
    ):
        measures = {"library": _measure(library, left, [head]), "operator": _measure(operator, left, [head])}
        what = f"{direction} {rows} x {left.shape[1]} x {columns}, the head; {_own(left, columns)}"
        cells = _rates(measures, HEAD_CALLS, setting.repeats)
        lines.append(Line(name=f"{direction}_head", what=what, unit="GFLOP/s", cells=cells, over=OVER))
    return lines


def _new_lines(setting: Setting) -> list[Line]:
    """A product's first call with a number of rows that has not been seen, and its second."""
    weight = _weights(setting, "gate_up")[0]
    out, depth = weight.shape
    lines = []
    for name, product in (("library", _library_forward), ("operator", _operator_forward)):
        measures = [
            _measure(product, torch.randn(setting.sizes.length + 1 + i, depth).to(torch.bfloat16), [weight])
            for i in range(setting.repeats)
        ]
        calls = ("first call", "second call")
        cells = {call: tuple(1e3 * measure(0)["seconds"] for measure in measures) for call in calls}
        what = f"rows of a new number by the {name}, x {depth} x {out}"
        lines.append(Line(name=f"new_{name}", what=what, unit="ms", cells=cells))
    return lines


def _panel_line(site: str, rows: int, weights: Sequence[Tensor], repeats: int) -> Line:
    """Few rows by the library, and by the operator with weights as they are and kept as panels."""
    out, depth = weights[0].shape
    x = torch.randn(rows, depth).to(torch.bfloat16)
    names = {"name": f"few_{site}", "what": f"forward {rows} x {depth} x {out}", "unit": "GFLOP/s"}
    measures = {
        "library": _measure(_library_forward, x, weights),
        "operator": _measure(_operator_forward, x, weights, later=True),
    }
    if not panel_bytes(weights[0]):
        cells = _rates(measures, len(weights), repeats)
        return Line(**names, cells=cells, over=OVER, note="this processor has no panels")
    with _panels(weights) as kept:
        measures["panels"] = _measure(_operator_forward, x, kept)
        cells = _rates(measures, len(weights), repeats)
    return Line(**names, cells=cells, over=(*OVER, ("panels", "operator")))


@contextmanager
def _panels(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of weights that are kept as panels for as long as it lasts."""
    copies = [weight.clone() for weight in weights]
    for weight in copies:
        keep_panels(weight)
    try:
        yield copies
    finally:
        for weight in copies:
            drop_panels(weight)


def _rates(measures: Mapping[str, Measure], calls: int, repeats: int) -> dict[str, Values]:
    """GFLOP/s by column: a round is so many calls of each, one and one in turn, for the machine's speed changes faster
    than a round passes."""
    samples = in_turns(measures, repeats * calls, warm_ups=calls)
    return {name: giga(rounds(found, calls)) for name, found in samples.items()}


def _measure(product: Product, left: Tensor, weights: Sequence[Tensor], later: bool = False) -> Measure:
    """A turn: the product with the next weight, or with the one half of them `later`, which the other side has not
    just read; units are FLOPs."""
    count, shift = len(weights), len(weights) // 2 if later else 0
    flops = 2 * left.shape[0] * weights[0].numel()

    def work(weight: Tensor) -> float:
        product(left, weight)
        return flops

    return lambda turn: timed(lambda: work(weights[(turn + shift) % count]))


def _library_forward(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def _operator_forward(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = linear.FORWARD(x, weight, None, 0)
    return y


def _own(left: Tensor, columns: int) -> str:
    """Who multiplies in the operator."""
    own = cpu.AVAILABLE and own_product(left, columns) is not None
    return "own product" if own else "the operator calls the library too"
