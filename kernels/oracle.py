"""How far a fast form may be from the truth: twice as far as plain PyTorch in the same dtype, plus one rounding.

The truth is the reference itself run in float64. Where a result is small beside what it is summed of, plain PyTorch may
be right by luck; then the truth of inputs that are off by one rounding of fp32 is as good (Higham 2002, section 1.5:
backward error). Used by the tests on every device and before any speed is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Float64(TorchFunctionMode):
    """Within it, everything that asks for a narrower floating type gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if kwargs.get("dtype") in _NARROW or (func in (torch.zeros, torch.empty, torch.ones) and "dtype" not in kwargs):
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a for a in args)
        return func(*args, **kwargs)


def doubled(value: Any) -> Any:
    """Copies of the floating tensors in float64, in whatever structure they lie."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(doubled(v) for v in value)
    return value


def jittered(value: Any) -> Any:
    """The same in float64, each number off by at most one rounding of fp32, at random."""
    if isinstance(value, Tensor) and value.is_floating_point():
        wide = value.double()
        return wide * (1 + torch.finfo(torch.float32).eps * (2 * torch.rand_like(wide) - 1))
    if isinstance(value, list | tuple):
        return type(value)(jittered(v) for v in value)
    return value


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of a result, lists opened."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if outputs is None:
        return []
    return [tensor for output in outputs for tensor in flat(output)]


def in_float64(reference: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """Results of the reference on the arguments, computed in float64."""
    with Float64():
        return flat(reference(*doubled(list(arguments))))


def neighbours(reference: Callable[..., Any], arguments: Sequence[Any], count: int = 8) -> list[list[Tensor]]:
    """Results in float64 for `count` sets of arguments off by one rounding of fp32."""
    return [in_float64(reference, jittered(list(arguments))) for _ in range(count)]


def distance(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| (Frobenius); infinite where a value is not finite, absolute where the truth is 0."""
    wide, truth = value.double(), truth.to(value.device)
    if not bool(torch.isfinite(wide).all()):
        return float("inf")
    gap, size = float((wide - truth).norm()), float(truth.norm())
    return gap / size if size else gap


def budget(reference: Tensor, truth: Tensor, near: Sequence[Tensor] = ()) -> float:
    """The distance a fast form may have where the reference in the same dtype and neighbours have theirs.

    One rounding is two units in the last place: of a single number, plain PyTorch may be right by luck.
    """
    luck = max((distance(neighbour, truth) for neighbour in near), default=0.0)
    return 2 * (distance(reference, truth) + luck) + 2 * torch.finfo(reference.dtype).eps


def excess(
    name: str, values: Any, references: Any, truths: Sequence[Tensor], near: Sequence[Sequence[Tensor]] = ()
) -> list[str]:
    """A line for each output that is further from the truth than its budget, or of another shape or dtype."""
    found, expected = flat(values), flat(references)
    if len(found) != len(expected):
        return [f"{name}: {len(found)} outputs instead of {len(expected)}"]
    lines = []
    for i, (value, reference, truth) in enumerate(zip(found, expected, truths, strict=True)):
        if value.shape != reference.shape or value.dtype != reference.dtype:
            lines.append(
                f"{name}[{i}]: {value.dtype} {tuple(value.shape)}, not {reference.dtype} {tuple(reference.shape)}"
            )
        elif not math.isfinite(most := budget(reference, truth, [outputs[i] for outputs in near])):
            lines.append(f"{name}[{i}]: the reference itself is not finite, so it cannot judge")
        elif (gap := distance(value, truth)) > most:
            lines.append(f"{name}[{i}]: relative error {gap:.2e} above {most:.2e}")
    return lines
