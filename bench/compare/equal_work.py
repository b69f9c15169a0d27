"""Whether two sides did the same work: their losses and gradient norms, or their tokens, against fp32's.

Two bf16 implementations never agree to the last bit, so what may differ is measured: how far the reference's own bf16
is from fp32 on the same batches. Ours may be twice as far.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BF16_ROUNDING = 2.0**-8
"""Largest relative error of one rounding to bf16's 8 significant bits."""
GRADIENT_ROUNDINGS = 4
"""Roundings on the way of an adapter's gradient: the input, the incoming gradient, the low-rank product, the result."""
SPREADS = 3
"""Standard errors by which the mean of a batch's rounding errors could have been off by chance."""
EXACT_SHARE = 0.01
"""Difference of two fp32 implementations after some steps, of a loss or a norm."""
LOST_SHARE = 1 / 8
"""Share of greedy tokens that near ties may cost beyond twice the reference's; a wrong model loses nearly all."""


class UnequalWork(ValueError):
    """The sides did not do the same work; the message has the numbers."""


@dataclass(frozen=True)
class Trajectory:
    """Losses and gradient norms (before clipping) of the compared steps, dropout 0."""

    losses: Sequence[float]
    norms: Sequence[float]


@dataclass(frozen=True)
class LabelNoise:
    """Per-label losses of one batch by the reference in bf16 and in fp32; `independent` is the number of labels whose
    errors are, where it is not all: the few labels of a sequence share what came before them."""

    rounded: Sequence[float]
    exact: Sequence[float]
    independent: int | None = None

    def standard_error(self) -> float:
        """Standard error that the labels' rounding errors give a mean over as many labels."""
        errors = [a - b for a, b in zip(self.rounded, self.exact, strict=True)]
        return statistics.pstdev(errors) / math.sqrt(self.independent or len(errors))


def check_steps(ours: Trajectory, reference: Trajectory, exact: Trajectory, noise: LabelNoise) -> dict[str, Any]:
    """The numbers of the comparison; UnequalWork where our losses or norms are further from fp32's than may be.

    A step's loss may be off by twice what the reference's was up to that step, or by chance could have been. It is up
    to that step because the first updates of AdamW follow the signs of small gradients: errors grow. The gradient is a
    mean over the same labels, so what chance does to the loss it may do, relatively, to the norm.
    """
    chance = SPREADS * noise.standard_error()
    own = [abs(a - b) for a, b in zip(reference.losses, exact.losses, strict=True)]
    own_norm = max(_relative(a, b) for a, b in zip(reference.norms, exact.norms, strict=True))
    own_norm = max(own_norm, chance / min(map(abs, exact.losses)))
    loss_limits = [2 * max(worst, chance) for worst in itertools.accumulate(own, max)]
    norm_limits = [2 * own_norm + GRADIENT_ROUNDINGS * BF16_ROUNDING] * len(exact.norms)
    return _compared({"ours": ours, "reference": reference, "fp32": exact}, loss_limits, norm_limits)


def check_exact_steps(ours: Trajectory, reference: Trajectory) -> dict[str, Any]:
    """The same where both sides computed in fp32: for methods at whose start bf16's own error says nothing, so large is
    it. UnequalWork where losses or norms differ by more than `EXACT_SHARE`."""
    loss_limits = [EXACT_SHARE * abs(loss) for loss in reference.losses]
    return _compared({"ours": ours, "fp32": reference}, loss_limits, [EXACT_SHARE] * len(reference.norms))


def _compared(
    sides: dict[str, Trajectory], loss_limits: Sequence[float], norm_limits: Sequence[float]
) -> dict[str, Any]:
    """How far "ours" is from "fp32", step by step."""
    ours, exact = sides["ours"], sides["fp32"]
    found = {
        "kind": "losses and gradient norms",
        "steps": len(exact.losses),
        "losses": {name: list(side.losses) for name, side in sides.items()},
        "norms": {name: list(side.norms) for name, side in sides.items()},
        "loss_errors": [_apart(a, b) for a, b in zip(ours.losses, exact.losses, strict=True)],
        "loss_limits": list(loss_limits),
        "norm_errors": [_relative(a, b) for a, b in zip(ours.norms, exact.norms, strict=True)],
        "norm_limits": list(norm_limits),
    }
    for what in ("loss", "norm"):
        for step, (error, limit) in enumerate(zip(found[f"{what}_errors"], found[f"{what}_limits"], strict=True)):
            if not error <= limit:
                raise UnequalWork(
                    f"{what} of step {step + 1} is {error:.3g} from fp32's, {limit:.3g} may be; "
                    f"losses {_shown(found['losses'])}; norms {_shown(found['norms'])}"
                )
    return found


def check_tokens(
    ours: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], exact: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The numbers of the comparison; UnequalWork where our greedy tokens leave fp32's earlier than may be.

    A sequence's tokens count as lost from the first that differs: near ties fall either way, and all after them too.
    """
    total = sum(len(tokens) for tokens in exact)
    lost = {name: _lost(tokens, exact) for name, tokens in (("ours", ours), ("reference", reference))}
    limit = 2 * lost["reference"] + LOST_SHARE * total
    found = {
        "kind": "greedy tokens",
        "tokens": total,
        "lost": lost,
        "lost_limit": limit,
        "identical": sum(list(a) == list(b) for a, b in zip(ours, reference, strict=True)),
        "sequences": len(exact),
    }
    if lost["ours"] > limit:
        raise UnequalWork(
            f"{lost['ours']} of {total} greedy tokens differ from fp32's, {limit:.0f} may; "
            f"the reference in bf16 loses {lost['reference']}"
        )
    return found


def _lost(tokens: Sequence[Sequence[int]], exact: Sequence[Sequence[int]]) -> int:
    lost = 0
    for mine, theirs in zip(tokens, exact, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
        )
        lost += max(len(mine), len(theirs)) - same
    return lost


def _apart(a: float, b: float) -> float:
    return abs(a - b) if math.isfinite(a) else math.inf


def _relative(a: float, b: float) -> float:
    return _apart(a, b) / max(abs(b), 1e-30)


def _shown(values: dict[str, list[float]]) -> str:
    return ", ".join(f"{side} {' '.join(f'{value:.5g}' for value in found)}" for side, found in values.items())
