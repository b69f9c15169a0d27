"""Section `micro`: time of every operator, its share of the ceilings, and what else one could run instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu import attention_others, head_loss, liger
from peftdyno.bench.gpu.cases import Case, all_cases, pointwise
from peftdyno.bench.gpu.results import Section, lost
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.timing import Ceilings, ceilings, median_ms
from peftdyno.engine.errors import first_line
from peftdyno.kernels.library import COSTS, PRIMITIVES
from peftdyno.kernels.triton import load

COPIES = 2
"""Sets of arguments that take turns."""


POINTWISE = ("rms_norm + residual", "rms_norm_backward frozen", "glu silu", "glu_backward silu", "rotary_")
"""Cases that are timed at several numbers of tokens."""


def at_tokens(case: str, tokens: int) -> str:
    """The row of a pointwise case at another number of tokens than the others'."""
    return f"{case}, {tokens} tokens"


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a case: ours, the alternatives, TFLOP/s and TB/s by the cost formula."""
    top = measured_ceilings(section, device, tiny=tiny)
    rows = [(case.name, case, sizes.tokens) for case in all_cases(sizes, device)]
    chosen = [case for case in pointwise(sizes, device) if case.name in POINTWISE]
    rows += [(at_tokens(case.name, n), case, n) for case in chosen for n in sizes.pointwise_tokens]
    for name, case, tokens in rows:
        if section.wants(name):
            with section.attempt(name):
                section.add(name, **_row(case, tokens, device, top, tiny=tiny))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    head_loss.run(section, sizes, device, tiny=tiny)
    _fused_product(section, sizes, device, tiny=tiny)


def _row(case: Case, tokens: int, device: torch.device, top: Ceilings, *, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    sets = [case.make(torch.float16 if tiny else torch.bfloat16, tokens) for _ in range(COPIES)]
    ours = _time(load(case.operator), sets, device)
    row = {"ms": ours} | _rates(case, sets[0], ours, top)
    for name in case.against.split():
        row |= _alternative(name, case, sets, device, tiny=tiny)
    return row


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


def _alternative(
    name: str, case: Case, sets: list[tuple[Any, ...]], device: torch.device, *, tiny: bool
) -> dict[str, Any]:
    """Milliseconds of an alternative, or what it raised; nothing where it is not installed."""
    try:
        return _others(name, case, sets, device, tiny=tiny)
    except Exception as error:
        if lost(error):
            raise
        return {f"{name}_failed": f"{type(error).__name__}: {first_line(error)}"}


def _others(
    name: str, case: Case, sets: list[tuple[Any, ...]], device: torch.device, *, tiny: bool
) -> dict[str, float]:
    reference = PRIMITIVES[case.operator].implementations["reference"]
    if name == "eager":
        return {"eager_ms": _time(reference, sets, device)}
    if name == "compile":
        return {"compile_ms": _time(_compiled(reference, tiny=tiny), sets, device)}
    if name != "liger":
        return attention_others.times(name, case, sets, device)
    if not liger.installed():
        return {}
    return {"liger_ms": median_ms([liger.FORMS[case.operator](*arguments) for arguments in sets], device)}


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
