"""The goals on one H200, each with its figure from the rows that were measured, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Row]]
"""Section -> name -> row."""
SITES = ("qkv", "o", "gate_up", "down")
GIGA = 1e9


@dataclass(frozen=True)
class Goal:
    """What is aimed at; `figure` reads it from the rows and raises KeyError or TypeError where it was not measured."""

    name: str
    bound: float
    at_most: bool
    unit: str
    figure: Callable[[Rows], float]

    def report(self, rows: Rows) -> dict[str, Any]:
        """The figure and whether it meets the goal; None where a row that it needs is not there."""
        try:
            value: float | None = self.figure(rows)
        except (KeyError, TypeError, ValueError):
            value = None
        met = None if value is None else (value <= self.bound if self.at_most else value >= self.bound)
        aim = f"{'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        return {"goal": self.name, "aim": aim, "figure": value, "met": met}


def _lora_over_frozen(rows: Rows, runs: int) -> float:
    micro, tuned, frozen = rows["micro"], 0.0, 0.0
    for site in SITES:
        label = f"{site}, {runs} runs, dropout 0.05, bordered"
        tuned += sum(micro[f"{op} {label}"]["ms"] for op in ("lora_linear", "lora_linear_backward"))
        frozen += sum(micro[f"{op} {site}"]["ms"] for op in ("linear", "linear_backward"))
    return tuned / frozen


def _over_frozen_step(rows: Rows, method: str) -> float:
    step = rows["step"]
    return float(step[method]["seconds"] / step["frozen forward and input gradient"]["seconds"])


def _pointwise(rows: Rows) -> list[Row]:
    names = ("rms_norm + residual", "rms_norm_backward frozen", "glu silu", "glu_backward silu", "rotary_")
    return [rows["micro"][name] for name in names]


def _over_others(rows: Rows) -> float:
    """The worst ratio of our time to the best of the others'."""
    ratios = []
    for row in _pointwise(rows):
        others = [row[key] for key in ("compile_ms", "liger_ms") if key in row]
        ratios.append(row["ms"] / min(others))
    return float(max(ratios))


def _attention_over_sdpa(rows: Rows) -> float:
    found = [rows["micro"][name] for name in ("attention equal", "attention_backward equal")]
    return float(min(row["sdpa_ms"] / row["ms"] for row in found))


def _speedup(rows: Rows, other: str) -> float:
    step = rows["step"]
    return float(step["lora r16, dropout, bordered"]["tokens_per_second"] / step[other]["tokens_per_second"])


def _largest(rows: Rows, key: str) -> float:
    """Of the memory section's row with the most tokens."""
    found = [row for name, row in rows["memory"].items() if name.endswith("tokens")]
    return float(max(found, key=lambda row: int(row["name"].split()[-2]))[key])


def _not_repeatable(rows: Rows) -> float:
    checks = [row["same_bits"] for row in rows["kernels"].values()]
    if not checks:
        raise KeyError("no kernel was checked")
    return float(sum(not same for same in checks))


def _unmeasured(rows: Rows) -> float:
    """No section measures it yet."""
    raise KeyError("no row")


def _read(section: str, name: str, key: str) -> Callable[[Rows], float]:
    return lambda rows: float(rows[section][name][key])


GOALS = (
    Goal("LoRA linears of a layer, 1 run, over the frozen ones", 1.06, True, "x", lambda r: _lora_over_frozen(r, 1)),
    Goal("LoRA linears of a layer, 8 runs, over the frozen ones", 1.15, True, "x", lambda r: _lora_over_frozen(r, 8)),
    *(
        Goal(f"{method} step over the frozen model's", 1.02, True, "x", lambda r, m=method: _over_frozen_step(r, m))
        for method in ("ia3", "ln-tuning", "bitfit")
    ),
    Goal(
        "RMSNorm, SwiGLU, RoPE: least share of copy bandwidth", 0.85, False, "",
        lambda r: min(row["of_ceiling"] for row in _pointwise(r)),
    ),
    Goal("RMSNorm, SwiGLU, RoPE: most time over Liger's or torch.compile's", 1.0, True, "x", _over_others),
    Goal("head and cross-entropy", 27.0, True, " ms", _read("micro", "label_loss", "ms")),
    Goal("head and cross-entropy, extra memory", 0.6, True, " GB", _unmeasured),
    Goal("attention without parents, SDPA's time over ours", 0.95, False, "x", _attention_over_sdpa),
    Goal(
        "LoRA step, share of the matmul ceiling", 0.7, False, "",
        _read("step", "lora r16, dropout, bordered", "of_matmul_ceiling"),
    ),
    Goal("LoRA step, speed over HF + PEFT", 1.8, False, "x", lambda r: _speedup(r, "HF + PEFT")),
    Goal("LoRA step, speed over HF + PEFT + Liger", 1.4, False, "x", lambda r: _speedup(r, "HF + PEFT + Liger")),
    Goal("a grid of runs together over HF Trainer + PEFT one after another", 5.0, False, "x", _unmeasured),
    Goal("a grid of runs together over one after another", 2.0, False, "x", _unmeasured),
    Goal(
        "decode, batch 1, graph: share of copy bandwidth", 0.75, False, "",
        _read("decode", "decode, batch 1, graph", "of_copy_ceiling"),
    ),
    Goal(
        "classification prompts, shared prefix", 40_000, False, " tokens/s",
        _read("decode", "classification prompts, shared prefix", "prompt_tokens_per_second"),
    ),
    Goal("peak memory of the step", 44.0, True, " GB", lambda r: _largest(r, "peak_bytes") / GIGA),
    Goal(
        "memory, error of the prediction", 0.005, True, "", lambda r: abs(_largest(r, "predicted_over_peak") - 1.0)
    ),
    Goal("kernels that do not give the same bits twice", 0, True, "", _not_repeatable),
)  # fmt: skip


def report(rows: Rows) -> list[dict[str, Any]]:
    """Every goal with its figure."""
    return [goal.report(rows) for goal in GOALS]


def lines(goals: list[dict[str, Any]], *, counts: bool) -> list[str]:
    """A line a goal; where the run does not count (tiny sizes, no GPU), no verdict."""
    found = []
    for goal in goals:
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.4g}"
        verdict = "" if goal["met"] is None or not counts else ("  met" if goal["met"] else "  MISSED")
        found.append(f"  {goal['goal']:<68}{goal['aim']:>18}{figure:>14}{verdict}")
    return found
