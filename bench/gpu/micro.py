"""Section `micro`: time of every operator, its share of the ceilings, and what else one could run instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu import attention_others, head_loss, liger
from peftdyno.bench.gpu.cases import Case, all_cases
from peftdyno.bench.gpu.results import Section, lost
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.timing import Ceilings, ceilings, median_ms
from peftdyno.engine.errors import first_line
from peftdyno.kernels import tuning
from peftdyno.kernels.library import COSTS, PRIMITIVES

COPIES = 2
"""Sets of arguments that take turns."""
LIBRARIES = ("liger", "sdpa", "varlen", "flash")
"""Alternatives that need no compilation of ours."""

POINTWISE = ("rms_norm + residual", "rms_norm_backward frozen", "glu silu", "glu_backward silu", "rotary_")
"""Cases that are timed at several numbers of tokens."""


def at_tokens(case: str, tokens: int) -> str:
    """The row of a pointwise case at another number of tokens than the others'."""
    return f"{case}, {tokens} tokens"


def by(name: str, other: str) -> str:
    """The row of an alternative to the call of a row."""
    return f"{name} by {other}"


@dataclass(frozen=True)
class Timed:
    """A case at a number of tokens, and the name of its row."""

    name: str
    case: Case
    tokens: int

    def sets(self, *, tiny: bool) -> list[tuple[Any, ...]]:
        """The same arguments for every column."""
        torch.manual_seed(0)
        return [self.case.make(torch.float16 if tiny else torch.bfloat16, self.tokens) for _ in range(COPIES)]


def timed(sizes: Sizes, device: torch.device) -> list[Timed]:
    """Every case at the tokens of a step, and the pointwise ones at others too."""
    rows = [Timed(case.name, case, sizes.tokens) for case in all_cases(sizes, device)]
    chosen = [row.case for row in rows if row.name in POINTWISE]
    return rows + [Timed(at_tokens(case.name, n), case, n) for case in chosen for n in sizes.pointwise_tokens]


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a case, with TFLOP/s and TB/s by the cost formula, and a row an alternative. What goals rest on comes
    first; what else has to be compiled comes last."""
    top = measured_ceilings(section, device, tiny=tiny)
    rows = timed(sizes, device)
    goals, rest = [row for row in rows if row.case.goal], [row for row in rows if not row.case.goal]

    def measure(name: str, row: Callable[[], dict[str, Any]]) -> None:
        if section.wants(name):
            with section.attempt(name):
                section.add(name, **row())
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def ours(chosen: list[Timed]) -> None:
        for row in chosen:
            measure(row.name, lambda row=row: _row(row, device, top, tiny=tiny))  # type: ignore[misc]

    def others(chosen: list[Timed], *names: str) -> None:
        for name in (name for name in names if _available(name, device)):
            for row in (row for row in chosen if name in row.case.against.split()):
                measure(by(row.name, name), lambda row=row, name=name: _alternative(name, row, device, tiny=tiny))  # type: ignore[misc]

    ours(goals)
    head_loss.run(section, sizes, device, tiny=tiny)
    others(goals, *LIBRARIES)
    others([row for row in rows if row.case.name in POINTWISE], "compile")
    ours(rest)
    _fused_product(section, sizes, device, tiny=tiny)
    others(rest, *LIBRARIES)
    others(rows, "eager")
    others([row for row in rows if row.case.name not in POINTWISE], "compile")


def _row(row: Timed, device: torch.device, top: Ceilings, *, tiny: bool) -> dict[str, Any]:
    sets = row.sets(tiny=tiny)
    ms = _time(row.case.call, sets, device)
    return {"ms": ms} | _rates(row.case, sets[0], ms, top) | _untuned(row.case, sets, device)


def _untuned(case: Case, sets: list[tuple[Any, ...]], device: torch.device) -> dict[str, float]:
    """Milliseconds with shipped tiles and default forms, where others were measured."""
    if tuning.measured(device) == tuning.Measured():
        return {}
    with tuning.untuned():
        return {"untuned_ms": _time(case.call, sets, device)}


def measured_ceilings(section: Section, device: torch.device, *, tiny: bool) -> Ceilings:
    """Those of this run, measured once."""
    if "ceilings" not in section.rows:
        section.add("ceilings", **ceilings(device, tiny=tiny).row())
    row = section.rows["ceilings"]
    return Ceilings(row["bytes_per_second"], row["flops_per_second"])


def _time(function: Callable[..., Any], sets: list[tuple[Any, ...]], device: torch.device) -> float:
    return median_ms([lambda a=arguments: function(*a) for arguments in sets], device)


def _rates(case: Case, arguments: tuple[Any, ...], ms: float, top: Ceilings) -> dict[str, float]:
    """By the operator's own cost formula; the share is of the ceiling that bounds it."""
    cost = COSTS[case.operator](*arguments)
    flops, moved = cost.base.matrix + cost.adapter.matrix, cost.base.bytes + cost.adapter.bytes
    floor = max(flops / top.flops_per_second, moved / top.bytes_per_second)
    return {"tflops": flops / ms / 1e9, "tbytes": moved / ms / 1e9, "of_ceiling": 1e3 * floor / ms}


def _available(name: str, device: torch.device) -> bool:
    """Whether an alternative is to be had."""
    if name == "liger":
        return liger.installed()
    return attention_others.available(name, device) if name in attention_others.FORMS else True


def _alternative(name: str, row: Timed, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Milliseconds of an alternative, or what it raised."""
    try:
        return {"ms": _other(name, row.case, row.sets(tiny=tiny), device, tiny=tiny)}
    except Exception as error:
        if lost(error):
            raise
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _other(name: str, case: Case, sets: list[tuple[Any, ...]], device: torch.device, *, tiny: bool) -> float:
    reference = PRIMITIVES[case.operator].implementations["reference"]
    if name == "eager":
        return _time(reference, sets, device)
    if name == "compile":
        return _time(_compiled(reference, tiny=tiny), sets, device)
    if name == "liger":
        return median_ms([liger.FORMS[case.operator](*arguments) for arguments in sets], device)
    return attention_others.milliseconds(name, case, sets, device)


def _compiled(reference: Callable[..., Any], *, tiny: bool) -> Callable[..., Any]:
    """For these shapes alone; at tiny sizes traced, but not translated."""
    torch.compiler.reset()
    return torch.compile(reference, dynamic=False, backend="eager" if tiny else "inductor")


def _fused_product(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """One Triton product with the low-rank term inside, beside the library's bordered one and its plain one."""
    config, dtype = sizes.config(), torch.float16 if tiny else torch.bfloat16
    d, f, n, p = config.hidden_size, config.intermediate_size, sizes.tokens, max(16, sizes.rank)
    for site, columns, out in (("gate_up", d, 2 * f), ("down", f, d)):
        name = f"fused product {site}"
        if section.wants(name):
            with section.attempt(name):
                whole, weight = (torch.randn(m, columns + p, device=device).to(dtype) for m in (n, out))
                section.add(name, **_products(whole, weight, columns, device))


def _products(whole: Tensor, weight: Tensor, columns: int, device: torch.device) -> dict[str, float]:
    from peftdyno.kernels.triton import lora_gemm

    x, w, u, up = whole[:, :columns], weight[:, :columns], whole[:, columns:], weight[:, columns:]
    return {
        "ms": median_ms([lambda: lora_gemm.product(x, w, u, up)], device),
        "bordered_ms": median_ms([lambda: torch.mm(whole, weight.t())], device),
        "frozen_ms": median_ms([lambda: torch.mm(x, w.t())], device),
    }
