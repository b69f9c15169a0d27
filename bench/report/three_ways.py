"""PSCP three ways: from the inputs that PEFT-Bench printed, from the same inputs put right, and measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftdyno.bench.published import tables
from peftdyno.bench.published.source import published
from peftdyno.bench.report.costs import mean
from peftdyno.bench.store import RunRecord

Figure = Callable[[float | None], float | None]
"""Inference TFLOP above the base model -> PSCP."""


@dataclass(frozen=True, kw_only=True)
class ThreeWays:
    """One method, all exponents 1. Published and corrected are of PEFT-Bench's model and data sets, and None where it
    has none; measured and the FLOPs are of this sweep's. `merged` figures are None where a method cannot be merged.
    FLOPs are above the base model's over 1 x 512 tokens, predicted."""

    method: str
    published: float | None
    corrected: float | None
    """Unmerged."""
    corrected_merged: float | None
    measured: float | None
    measured_merged: float | None
    mergeable: bool | None
    """None where the runs do not say."""
    prefill_tflop: float | None
    prefill_tflop_merged: float | None
    token_tflop: float | None
    """One token generated after the sequence, with a key and value cache."""
    token_tflop_merged: float | None


def three_ways(method: str, records: Sequence[RunRecord], measured: float | None, figure: Figure) -> ThreeWays:
    """Of a method's runs; `measured` is its PSCP, unmerged, and `figure` computes it for another inference cost."""
    source = published()
    scored = method in source.scored
    inputs = [tables.corrected_inputs(method, merged=merged) for merged in (False, True)] if scored else []
    unmerged, merged = (one.pscp(constants=source.constants) for one in inputs) if inputs else (None, None)
    printed = source.printed_inputs(method).pscp(constants=source.constants) if method in source.methods else None
    extra = {
        (phase, folded): _above(records, phase, folded)
        for phase in ("forward", "prefill", "decode")
        for folded in (False, True)
    }
    folded_cost = extra["forward", True]
    known = [record.inference for record in records if record.inference is not None]
    return ThreeWays(
        method=method,
        published=printed,
        corrected=unmerged,
        corrected_merged=merged,
        measured=measured,
        measured_merged=None if folded_cost is None else figure(folded_cost),
        mergeable=known[0].merged is not None if known else None,
        prefill_tflop=extra["prefill", False],
        prefill_tflop_merged=extra["prefill", True],
        token_tflop=extra["decode", False],
        token_tflop_merged=extra["decode", True],
    )


def _above(records: Sequence[RunRecord], phase: str, merged: bool) -> float | None:
    return mean(records, lambda r: None if r.inference is None else r.inference.tflop_above_base(phase, merged=merged))


def caption(model: str, tasks: Sequence[str]) -> str:
    """What must be known before two columns are compared."""
    source = published()
    return (
        f"Published and corrected are of {source.model.split('/')[-1]} over the {len(source.datasets)} data sets of "
        f"PEFT-Bench (arXiv:2511.21285); measured here, and all FLOPs, are of {model} over "
        f"{', '.join(tasks) or 'no common task'}. Compare methods down a column, never figures across columns. FLOPs "
        f"are above the base model's, predicted, unmerged / merged: to read {source.tokens} tokens, and to generate "
        "one more."
    )
