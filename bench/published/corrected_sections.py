"""What the page says of the corrected figures: every figure in it computed."""

from __future__ import annotations

import itertools
from dataclasses import replace

from ..pscp import exponent_grid, rank_stability, ranks
from . import costs, tables
from .section import Section, Table, by_rank, names, setting
from .source import published

MILLION = 1e6


def summary() -> Section:
    """The outcome in a few sentences."""
    order = by_rank(tables.corrected(merged=True))
    first, second = order[:2]
    low, high = tables.difference_interval(first, second)
    values, step = tables.corrected(merged=True), tables.steps("ia3")
    told = "cannot be told apart" if low <= 0 <= high else "differ by more than chance"

    return Section(
        "In short",
        [
            f"The printed tables follow from the printed inputs: {tables.agreement()} figures agree in "
            "every printed digit. The inputs themselves need two corrections: the means are not over the "
            "same data sets for every method, and the inference FLOPs carry an error of the profiler.",
            f"Corrected and merged, {first} ({values[first]:.2f}) and {second} ({values[second]:.2f}) lead; "
            f"over the choice of data sets they {told}. Exact FLOPs move IA3 from {step['printed']:.2f} to "
            f"{step['exact FLOPs']:.2f}. Ranks changed: {_moved(True)}.",
        ],
    )


def _moved(merged: bool) -> str:
    changes = tables.rank_changes(merged=merged)
    return names([f"{method} from {a} to {b}" for method, (a, b) in changes.items() if a != b])


def _input_row(label: str, method: str, encoder: costs.Encoder = "LSTM") -> list[str]:
    merged, unmerged = (tables.corrected_inputs(method, merged=m, encoder=encoder) for m in (True, False))
    million = costs.trainable_parameters(method, encoder=encoder) / MILLION
    cells = [f"{merged.score:.2f}", f"{million:.3f}", f"{merged.tflop:.4f}", f"{unmerged.tflop:.4f}"]
    return [label, *cells, f"{merged.memory_gb:.2f}"]


def _step_row(label: str, method: str, encoder: costs.Encoder = "LSTM") -> list[str]:
    return [label, *(f"{value:.2f}" for value in tables.steps(method, encoder=encoder).values())]


def _movement(merged: bool) -> str:
    order = ", ".join(by_rank(tables.corrected(merged=merged)))
    return f"{'Merged' if merged else 'Unmerged'}, the order is {order}; changed: {_moved(merged)}."


def _reason(method: str) -> str:
    """How far each correction alone moves a method's PSCP."""
    step = tables.steps(method)
    moves = [step[name] - step["printed"] for name in ("same data sets", "exact FLOPs")]
    return f"{method} by {moves[0]:+.2f} and {moves[1]:+.2f}"


def corrections() -> Section:
    """PSCP from corrected inputs, one correction at a time."""
    order = by_rank(tables.corrected(merged=True))
    inputs = [*(_input_row(m, m) for m in order), _input_row("p-tuning, MLP", "p-tuning", "MLP")]
    steps = [*(_step_row(m, m) for m in order), _step_row("p-tuning, MLP", "p-tuning", "MLP")]
    causal, full = (tables.corrected(merged=False, convention=c) for c in ("causal", "full"))
    apart = max(abs(causal[m] - full[m]) for m in full)
    bitfit = replace(published().printed_inputs("bitfit"), tflop=costs.extra_tflop("bitfit", "full"))
    return Section(
        "Corrected inputs, all exponents 1",
        [
            "P is the mean over all data sets for every method, Mf the exact TFLOP above the base model; "
            "parameters and memory are as printed. Merged means folded into the weights (IA3, LoRA) or the "
            "virtual tokens' encoder run beforehand (P-tuning, prefix tuning); the soft prompts keep their "
            "cost.",
            Table(["method", "P", "Mp / 1e6", "Mf merged", "Mf unmerged", "Mm / GB"], inputs),
            "PSCP from the printed inputs, with one correction alone, and with both (the last row has the "
            "MLP's parameters in every column):",
            Table(["method", *tables.steps("lora")], steps),
            _movement(True),
            _movement(False),
            "The same data sets and the exact FLOPs, each alone, move "
            + names([_reason(m) for m in published().scored])
            + " points.",
            "Attention is counted as a full square; over causal pairs no PSCP moves by more than "
            f"{apart:.3f}. BitFit's scores on the single data sets are not printed, only its mean of "
            f"{bitfit.score:.1f}, so it cannot be placed on the same data sets and has no rank here. With "
            "that mean and exact FLOPs, which merging does not change, it comes to "
            f"{bitfit.pscp(constants=published().constants):.2f}.",
        ],
    )


def all_exponents() -> Section:
    """The ten printed tables from corrected inputs."""
    methods = published().scored

    def rows(merged: bool) -> list[list[str]]:
        lines = []
        for table in published().tables:
            values = tables.corrected(table.exponents, merged=merged)
            after, before = ranks(values), ranks(tables.printed_pscp(table.exponents))
            cells = [
                f"{values[m]:.2f}" + (f" ({before[m]}→{after[m]})" if after[m] != before[m] else "") for m in methods
            ]
            lines.append([setting(table.exponents), *cells])
        return lines

    header = ["exponents", *methods]
    return Section(
        "The ten tables from corrected inputs",
        [
            "Where a method's rank differs from the one its printed inputs give, both are shown. Merged:",
            Table(header, rows(True)),
            "Unmerged:",
            Table(header, rows(False)),
        ],
    )


def phases() -> Section:
    """FLOPs of prefill and of a generated token."""

    def row(method: str) -> list[str]:
        cells = []
        for phase in ("prefill", "decode"):
            for merged in (True, False):
                flop = costs.exact_flop(method, "causal", merged=merged, phase=phase)
                flop += costs.pointwise_flop(method, merged=merged, phase=phase)
                cells.append(f"{flop / 1e12:.5f}" if phase == "prefill" else f"{flop / 1e9:.4f}")
        return [method, *cells]

    header = ["method", "prefill merged", "prefill unmerged", "token merged", "token unmerged"]
    return Section(
        "Prefill and one generated token",
        [
            f"With a KV cache and causal attention: TFLOP to read {published().tokens} tokens with logits "
            "for the last one only, and GFLOP for the token generated after them. A soft prompt is paid "
            "for once, at prefill; later tokens only attend to its rows. PSCP's own cost, logits at every "
            "position of one pass, does not show that.",
            Table(header, [row(m) for m in ("base", *published().methods)]),
        ],
    )


def confidence() -> Section:
    """How firm the ranking is."""
    inputs = {m: tables.corrected_inputs(m, merged=True) for m in published().scored}
    stable = rank_stability(inputs, exponent_grid(), constants=published().constants)
    order = by_rank(tables.corrected(merged=True))
    rows = []
    for method in order:
        low, high = tables.task_interval(method)
        spread = f"{stable.best[method]} to {stable.worst[method]}"
        rows.append(
            [
                method,
                str(stable.rank[method]),
                f"{low:.1f} to {high:.1f}",
                f"{stable.kept[method]:.0%}",
                spread,
            ]
        )
    pairs = []
    for first, second in itertools.pairwise(order):
        low, high = tables.difference_interval(first, second)
        pairs.append([f"{first} - {second}", f"{low:.2f} to {high:.2f}", "no" if low <= 0 <= high else "yes"])
    return Section(
        "How firm the ranking is",
        [
            "Intervals are 95% bootstrap intervals over the choice of data sets (corrected inputs, merged, "
            "all exponents 1). The spread over seeds cannot be included: scores are printed for one run a "
            f"data set. The last two columns let the three exponents vary over {stable.settings} "
            "combinations of 0.5, 1, 2, 3 and 4: the share in which a method keeps its rank, and the ranks "
            "it takes.",
            Table(["method", "rank", "interval", "keeps its rank", "ranks"], rows),
            f"Kendall's tau with the order at all exponents 1 is {stable.mean_tau:.2f} on average and "
            f"{stable.least_tau:.2f} at least. Neighbours compared on the same resampled data sets:",
            Table(["difference", "interval", "clear of 0"], pairs),
        ],
    )


def limits() -> Section:
    """What these corrections leave as it was."""
    return Section(
        "What is left as printed",
        [
            "Memory is the mean over runs of the largest value of a device-wide figure that an experiment "
            "tracker sampled every few seconds. Short peaks can be missed, and the CUDA context and the "
            "allocator's cache are included. Prefix tuning ran without gradient checkpointing and with a "
            "larger validation split, the others otherwise. The runs' own peaks are not published, so this "
            "cannot be corrected from outside.",
            "Scores keep the benchmark's scoring rules; correcting those needs the predictions. PSCP from "
            "runs measured here is reported with those runs.",
        ],
    )
