"""The printed tables recomputed, and the same tables from corrected inputs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..pscp import ALL_ONE, Exponents, Inputs, bootstrap, interval, ranks
from .costs import Convention, Encoder, extra_tflop, trainable_parameters
from .source import PrintedTable, published


def reproduced(table: PrintedTable) -> dict[str, float]:
    """PSCP of a printed table's methods from the printed inputs, to the printed two decimals."""
    constants = published().constants
    return {
        method: round(published().printed_inputs(method).pscp(table.exponents, constants), 2) for method in table.pscp
    }


def mismatches() -> list[tuple[Exponents, str, float, float]]:
    """(exponents, method, printed, recomputed) wherever the two differ in a printed digit."""
    found = []
    for table in published().tables:
        ours = reproduced(table)
        found += [(table.exponents, m, v, ours[m]) for m, v in table.pscp.items() if ours[m] != v]
    return found


def agreement() -> str:
    """How many of the printed figures come out with the printed digits, as "n of m"."""
    figures = sum(len(table.pscp) for table in published().tables)
    return f"{figures - len(mismatches())} of {figures}"


def mean_score(method: str, omitted: Sequence[str] = ()) -> float:
    """Mean of the printed scores over the data sets, without those omitted."""
    scores = published().scores[method]
    return statistics.fmean(scores[name] for name in published().datasets if name not in omitted)


def omissions(method: str, most: int = 2) -> dict[int, list[tuple[str, ...]]]:
    """For 0, 1, ... `most` data sets left out: the choices whose mean rounds to the printed mean."""
    printed, names = published().performance[method], published().datasets
    return {
        count: [c for c in itertools.combinations(names, count) if round(mean_score(method, c), 1) == printed]
        for count in range(most + 1)
    }


def corrected_inputs(
    method: str, *, merged: bool, convention: Convention = "full", encoder: Encoder = "LSTM"
) -> Inputs:
    """The mean over all data sets and the exact FLOPs; parameters and memory as printed."""
    return Inputs(
        score=mean_score(method),
        parameters=published().parameters[method],
        tflop=extra_tflop(method, convention, merged=merged, encoder=encoder),
        memory_gb=published().memory_gb[method],
    )


def corrected(exponents: Exponents = ALL_ONE, *, merged: bool, convention: Convention = "full") -> dict[str, float]:
    """PSCP of every method with published scores, from corrected inputs."""
    return {
        method: corrected_inputs(method, merged=merged, convention=convention).pscp(exponents, published().constants)
        for method in published().scored
    }


def printed_pscp(exponents: Exponents = ALL_ONE) -> dict[str, float]:
    """PSCP of the same methods from the printed inputs, not rounded."""
    return {m: published().printed_inputs(m).pscp(exponents, published().constants) for m in published().scored}


def mlp_encoder(inputs: Inputs) -> Inputs:
    """P-tuning's inputs with the parameters of the MLP encoder that the training configuration names."""
    return replace(inputs, parameters=trainable_parameters("p-tuning", encoder="MLP"))


def steps(method: str, *, encoder: Encoder = "LSTM") -> dict[str, float]:
    """PSCP, all exponents 1, one correction at a time and with all; `encoder` matters to p-tuning."""
    printed = published().printed_inputs(method)
    fixed = corrected_inputs(method, merged=True)
    variants = {
        "printed": printed,
        "same data sets": replace(printed, score=fixed.score),
        "exact FLOPs": replace(printed, tflop=fixed.tflop),
        "both, merged": fixed,
        "both, unmerged": corrected_inputs(method, merged=False, encoder=encoder),
    }
    if method == "p-tuning" and encoder == "MLP":
        variants = {name: mlp_encoder(inputs) for name, inputs in variants.items()}
    return {name: inputs.pscp(ALL_ONE, published().constants) for name, inputs in variants.items()}


def rank_changes(exponents: Exponents = ALL_ONE, *, merged: bool = True) -> dict[str, tuple[int, int]]:
    """(rank from printed inputs, rank from corrected inputs) of every method."""
    before, after = ranks(printed_pscp(exponents)), ranks(corrected(exponents, merged=merged))
    return {method: (before[method], after[method]) for method in before}


def task_draws(method: str, draws: int = 10_000) -> np.ndarray:
    """Corrected PSCP, merged, over resamples of the data sets that all methods share."""
    inputs = corrected_inputs(method, merged=True)
    return bootstrap(
        [[published().scores[method][name]] for name in published().datasets],
        inputs.memory_gb,
        inputs.parameters,
        inputs.tflop,
        constants=published().constants,
        over=("tasks",),
        draws=draws,
    )


def task_interval(method: str) -> tuple[float, float]:
    """The 95% interval of `task_draws`."""
    return interval(task_draws(method))


def difference_interval(first: str, second: str) -> tuple[float, float]:
    """The 95% interval of the paired difference of two methods' corrected PSCP."""
    return interval(task_draws(first) - task_draws(second))
