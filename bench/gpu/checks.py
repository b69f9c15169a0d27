"""Section `kernels`: every operator against its reference in float64, by the rule of `peftdyno.kernels.oracle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu.cases import Case, all_cases
from peftdyno.bench.gpu.other_cases import other_cases
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.kernels.library import PRIMITIVES
from peftdyno.kernels.oracle import budget, distance, flat, in_float64


def results(function: Callable[..., Any], changed: tuple[int, ...]) -> Callable[..., list[Tensor]]:
    """What the function returns, and what it leaves in copies of the arguments that it changes."""

    def call(*arguments: Any) -> list[Tensor]:
        copies = [a.clone() if i in changed else a for i, a in enumerate(arguments)]
        made = function(*copies)
        return [*flat(made), *(copies[i] for i in changed)]

    return call


def worst_share(case: Case, arguments: tuple[Any, ...]) -> float:
    """The largest error over its budget among the outputs; above 1 is wrong. Raises where a shape or dtype differs."""
    reference = PRIMITIVES[case.operator].implementations["reference"]
    found = results(case.call, case.changed)(*arguments)
    plain = results(reference, case.changed)(*arguments)
    truth = in_float64(results(reference, case.changed), arguments)
    shares = [0.0]
    for value, expected, exact in zip(found, plain, truth, strict=True):
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), (value.shape, expected.shape)
        if exact.numel():
            shares.append(distance(value, exact) / budget(expected, exact))
    return max(shares)


def repeatable(case: Case, arguments: tuple[Any, ...]) -> bool:
    """Whether a second call gives the same bits."""
    call = results(case.call, case.changed)
    return all(torch.equal(a, b) for a, b in zip(call(*arguments), call(*arguments), strict=True))


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a case and dtype; fails at the end where one is wrong. Forms that only tuning chooses are of 16 bits."""
    dtypes = (torch.float16, torch.float32) if tiny else (torch.bfloat16, torch.float32)
    for case in [*all_cases(sizes, device), *other_cases(sizes, device)]:
        for dtype in dtypes[:1] if case.form else dtypes:
            name = f"{case.name} {str(dtype).removeprefix('torch.')}"
            if section.wants(name):
                with section.attempt(name):
                    section.add(name, **_row(case, dtype, sizes, len(section.rows)))
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _row(case: Case, dtype: torch.dtype, sizes: Sizes, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    arguments = case.make(dtype, sizes.labels_checked if case.operator == "label_loss" else _tokens(sizes))
    share, same = worst_share(case, arguments), repeatable(case, arguments)
    return {"error_over_budget": share, "same_bits": same, "ok": share <= 1 and same}


def _tokens(sizes: Sizes) -> int:
    """Rows of a check: no multiple of a tile, and few enough for scores in float64."""
    return min(sizes.tokens - 1, 1237)
