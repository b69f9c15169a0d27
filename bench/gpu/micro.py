"""Section `micro`: time of every operator, its share of the ceilings, and what else one could run instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from peftdyno.bench.gpu.cases import Case, all_cases
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.timing import Ceilings, ceilings, median_ms
from peftdyno.kernels.library import COSTS, PRIMITIVES
from peftdyno.kernels.triton import load

COPIES = 2
"""Sets of arguments that take turns."""


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a case: ours, the alternatives, TFLOP/s and TB/s by the cost formula."""
    top = measured_ceilings(section, device, tiny=tiny)
    for case in all_cases(sizes, device):
        if section.wants(case.name):
            torch.manual_seed(0)
            dtype = torch.float16 if tiny else torch.bfloat16
            sets = [case.make(dtype, sizes.tokens) for _ in range(COPIES)]
            ours = _time(load(case.operator), sets, device)
            row = {"ms": ours} | _rates(case, sets[0], ours, top)
            for name in case.against.split():
                row |= _alternative(name, case, sets, device, tiny=tiny)
            section.add(case.name, **row)
            del sets
            if device.type == "cuda":
                torch.cuda.empty_cache()
    _fused_product(section, sizes, device, tiny=tiny)


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
    """Milliseconds of an alternative, or why there are none."""
    reference = PRIMITIVES[case.operator].implementations["reference"]
    if name == "eager":
        return {"eager_ms": _time(reference, sets, device)}
    if name == "compile":
        return {} if tiny else {"compile_ms": _time(torch.compile(reference), sets, device)}
    if name == "sdpa":
        return _sdpa(case, sets, device)
    function = _liger(case.operator)
    return {} if function is None else {"liger_ms": _time(function, sets, device)}


def _sdpa(case: Case, sets: list[tuple[Any, ...]], device: torch.device) -> dict[str, float]:
    """PyTorch's fused attention on the same sequences, laid out as it wants them."""
    offset = case.operator == "attention_backward"
    q, k, v = sets[0][int(offset) : int(offset) + 3]
    segments = sets[0][8 if offset else 5]
    batch = len(segments)
    heads = [t.unflatten(0, (batch, -1)).transpose(1, 2).contiguous().requires_grad_(offset) for t in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    if not offset:
        return {"sdpa_ms": median_ms([lambda: attend(*heads, is_causal=True, enable_gqa=True)], device)}
    out = attend(*heads, is_causal=True, enable_gqa=True)
    dout = torch.randn_like(out)
    return {"sdpa_ms": median_ms([lambda: torch.autograd.grad(out, heads, dout, retain_graph=True)], device)}


def _liger(operator: str) -> Callable[..., Any] | None:
    """Liger's forward function of an operator, where the package is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {
        "rms_norm": lambda x, residual, weight, *_: LigerRMSNormFunction.apply(x + residual, weight, 1e-5),
        "glu": lambda gate_up, *_: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=1)),
        "label_loss": lambda x, head, targets, *_: LigerFusedLinearCrossEntropyFunction.apply(
            x.requires_grad_(), head, targets
        ),
    }.get(operator)


def _fused_product(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """One Triton product with the low-rank term inside, beside the library's bordered one and its plain one."""
    from peftdyno.kernels.triton import lora_gemm

    config, dtype = sizes.config(), torch.float16 if tiny else torch.bfloat16
    d, f, n, p = config.hidden_size, config.intermediate_size, sizes.tokens, max(16, sizes.rank)
    for site, columns, out in (("gate_up", d, 2 * f), ("down", f, d)):
        name = f"fused product {site}"
        if section.wants(name):
            whole, weight = (torch.randn(m, columns + p, device=device).to(dtype) for m in (n, out))
            x, w, u, up = whole[:, :columns], weight[:, :columns], whole[:, columns:], weight[:, columns:]
            row = {
                "ms": median_ms([lambda: lora_gemm.product(x, w, u, up)], device),  # noqa: B023
                "bordered_ms": median_ms([lambda: torch.mm(whole, weight.t())], device),  # noqa: B023
                "frozen_ms": median_ms([lambda: torch.mm(x, w.t())], device),  # noqa: B023
            }
            section.add(name, **row)
