"""Dequantising a 4-bit weight: the plain form, the look-up of pairs, C++, and a copy of as many bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from peftdyno.bench.compare.choices.lines import Line, milliseconds
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.choices.stream import copying
from peftdyno.bench.compare.turns import Measure, in_turns, timed
from peftdyno.engine.quant import QUANTISATIONS
from peftdyno.engine.weights import field_shape
from peftdyno.kernels import cpu, nf4
from peftdyno.kernels.nf4 import Nf4Weight, quantise

FORMS = {
    "reference": nf4.reference_dequantise,
    "pairs": nf4.dequantise_by_pairs,
    "compiled": nf4.dequantise_compiled,
}
"""Column -> the form; the last needs the C++ extension."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def four_bit(setting: Setting) -> list[Line]:
    """The weight of the MLP's first product and one of the head's shape, in both kinds and dtypes; absolute maxima in
    8 bits are dequantised in each turn too."""
    config = setting.config
    shapes = {"gate_up": field_shape(config, "gate_up"), "head": (config.vocab_size, config.hidden_size)}
    lines = []
    for site, shape in shapes.items():
        dense = torch.randn(shape)
        for kind, nested in QUANTISATIONS.items():
            weight = quantise(dense, nested=nested)
            lines += [_line(site, kind, weight, name, dtype, setting.repeats) for name, dtype in DTYPES.items()]
    return lines


def _line(site: str, kind: str, weight: Nf4Weight, name: str, dtype: torch.dtype, repeats: int) -> Line:
    forms = [form for form in FORMS if form != "compiled" or cpu.AVAILABLE]
    measures = {form: _measure(form, weight, dtype) for form in forms}
    measures["copy"] = _copy(weight, dtype)
    rows, columns = weight.shape
    fastest = forms[-1]
    return Line(
        name=f"{site}_{kind}_{name}",
        what=f"{rows} x {columns}, {kind}, {name}",
        unit="ms",
        cells={form: milliseconds(samples) for form, samples in in_turns(measures, repeats).items()},
        over=(*((form, fastest) for form in forms[:-1]), (fastest, "copy")),
        note="" if cpu.AVAILABLE else "the C++ extension is not built",
    )


def _measure(form: str, weight: Nf4Weight, dtype: torch.dtype) -> Measure:
    rows, columns = weight.shape

    def work() -> float:
        FORMS[form](weight.codes, weight.scales(), rows, columns, dtype)
        return 1.0

    return lambda _: timed(work)


def _copy(weight: Nf4Weight, dtype: torch.dtype) -> Measure:
    """As many bytes as codes, maxima and result have, half of them read and half written."""
    rows, columns = weight.shape
    moved = sum(map(_bytes, weight.tensors())) + rows * columns * dtype.itemsize
    source = torch.ones(moved // 2, dtype=torch.uint8)
    work = copying(source, torch.empty_like(source))
    return lambda _: {**timed(work), "units": 1.0}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
