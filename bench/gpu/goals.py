"""The goals on one H200, each with its figure from the rows that were measured, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftdyno.bench.gpu import decode, grid, hf_step, losses, same_bits
from peftdyno.bench.gpu.goal import Goal, Row, Rows, at_least, at_most, read
from peftdyno.bench.gpu.head_loss import SPARSE, row_name
from peftdyno.bench.gpu.memory import peak_name
from peftdyno.bench.gpu.micro import POINTWISE, at_tokens, by
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import FROZEN, HF, HF_LIGER, Setting, lean, settings

SITES = ("qkv", "o", "gate_up", "down")
LIGHT = ("ia3", "ln-tuning", "bitfit")
GIGA = 1e9
PROPORTION = 1.2
"""What is said to cost in proportion may cost a fifth more: a launch, and the last tile of each sequence, are paid in
full."""
ONE_BIT = 0.5
"""Masks of one bit an element would add this much of themselves at the very least."""


def _lora_over_frozen(runs: int) -> Callable[[Rows], float]:
    def figure(rows: Rows) -> float:
        micro, tuned, frozen = rows["micro"], 0.0, 0.0
        for site in SITES:
            label = f"{site}, {runs} runs, dropout 0.05, bordered"
            tuned += micro[f"lora_linear {label}"]["ms"] + _lora_backward(micro, site, label)
            frozen += sum(micro[f"{op} {site}"]["ms"] for op in ("linear", "linear_backward"))
        return tuned / frozen

    return figure


def _lora_backward(micro: Mapping[str, Row], site: str, label: str) -> float:
    """Milliseconds; behind the activation what is added to its own backward pass, where that is the faster form."""
    apart = float(micro[f"lora_linear_backward {label}"]["ms"])
    if site != "down":
        return apart
    joined = micro[f"glu_lora_backward {label}"]["ms"] - micro["glu_backward silu"]["ms"]
    return min(apart, float(micro["linear_backward down"]["ms"] + joined))


def _share_of_copy(rows: Rows) -> float:
    return float(min(rows["micro"][name]["of_ceiling"] for name in POINTWISE))


def _others(micro: Mapping[str, Row], name: str, *others: str) -> float:
    """Milliseconds of the fastest of others; the first of them is to be had everywhere. Raises KeyError where that was
    not tried yet, ValueError where none ran."""
    tried = [micro[by(name, other)] for other in others if other == others[0] or by(name, other) in micro]
    return float(min(row["ms"] for row in tried if "ms" in row))


def _over_others(sizes: Sizes) -> Callable[[Rows], float]:
    """The worst ratio of our time to the best of the others', at every size."""
    names = [*POINTWISE, *(at_tokens(name, n) for name in POINTWISE for n in sizes.pointwise_tokens)]

    def figure(rows: Rows) -> float:
        micro = rows["micro"]
        return float(max(micro[name]["ms"] / _others(micro, name, "compile", "liger") for name in names))

    return figure


def _others_note(rows: Rows) -> str:
    return "" if by(POINTWISE[0], "liger") in rows["micro"] else "Liger-Kernel is not installed"


def _of_label_share(rows: Rows) -> float:
    """Time with some labels over that with all, over the share of labels."""
    micro = rows["micro"]
    some, every = micro[row_name(SPARSE)], micro[row_name(1)]
    return float(some["ms"] / every["ms"] / (some["labels"] / every["labels"]))


def _attention_over_others(rows: Rows) -> float:
    """The worst ratio of the best library's time to ours: over packs of equal sequences, and of ragged ones where a
    library for those was there."""
    micro, beside = rows["micro"], []
    for operator in ("attention", "attention_backward"):
        beside.append((f"{operator} equal", ("sdpa", "varlen", "flash")))
        if by(f"{operator} ragged", "varlen") in micro:
            beside.append((f"{operator} ragged", ("varlen", "flash")))
    return float(min(_others(micro, name, *others) / micro[name]["ms"] for name, others in beside))


def _attention_note(rows: Rows) -> str:
    names = [(name, rows["micro"].get(by("attention equal", name), {})) for name in ("sdpa", "varlen", "flash")]
    return f"beside {', '.join(name for name, row in names if 'ms' in row)}"


def _time_a_pair(rows: Rows) -> float:
    """Time a visible pair where sequences share a parent, over that where they have none; the worse direction."""
    micro = rows["micro"]
    operators = ("attention", "attention_backward")
    return float(max(micro[f"{op} ragged"]["tflops"] / micro[f"{op} shared prefix"]["tflops"] for op in operators))


def _exact(rows: Rows) -> float:
    """The worst error of the head and loss over its budget, in any dtype."""
    found = [row["error_over_budget"] for name, row in rows["kernels"].items() if name.startswith("label_loss ")]
    return float(max(found))


def _over_frozen_step(method: str) -> Callable[[Rows], float]:
    return lambda rows: float(rows["step"][method]["seconds"] / rows["step"][FROZEN]["seconds"])


def _fastest(rows: Rows, side: str) -> str:
    """The faster of PEFT's rows with adapters in fp32 and in bf16. Raises KeyError where one was not tried, ValueError
    where neither ran."""
    speeds = {name: rows["step"][name].get("tokens_per_second", 0.0) for name in hf_step.rows(side)}
    best = max(speeds, key=lambda name: speeds[name])
    if not speeds[best]:
        raise ValueError(side)
    return best


def _speedup(ours: str, side: str) -> Callable[[Rows], float]:
    def figure(rows: Rows) -> float:
        step = rows["step"]
        return float(step[ours]["tokens_per_second"] / step[_fastest(rows, side)]["tokens_per_second"])

    return figure


def _hf_note(side: str) -> Callable[[Rows], str]:
    """Says which of theirs was faster, and where it did not fit and took its batch in parts."""

    def note(rows: Rows) -> str:
        best = _fastest(rows, side)
        adapters = hf_step.BF16 if best.endswith(hf_step.BF16) else "fp32 adapters"
        return f"theirs with {adapters}, {rows['step'][best]['at_once']} sequences at once"

    return note


def _not_repeatable(rows: Rows) -> float:
    checks = [row["same_bits"] for row in rows["kernels"].values()]
    if not checks:
        raise KeyError("no kernel was checked")
    return float(sum(not same for same in checks))


def _grid_over(other: Callable[[Rows], str]) -> Callable[[Rows], float]:
    def figure(rows: Rows) -> float:
        found = rows["grid"]
        return float(found[grid.TOGETHER]["runs_per_hour"] / found[other(rows)]["runs_per_hour"])

    return figure


def _grid_note(rows: Rows) -> str:
    return (
        "" if grid.theirs(rows["grid"]) == grid.TRAINER else "theirs in a plain loop, for accelerate is not installed"
    )


def _peak(sizes: Sizes, key: str, setting: Setting) -> Callable[[Rows], float]:
    return read("memory", peak_name(sizes, setting), key)


def _misses(sizes: Sizes) -> Callable[[Rows], float]:
    """Error of the prediction, with all activations kept or with fewer, whichever is larger."""
    found = [_peak(sizes, "predicted_over_peak", setting) for setting in (settings(sizes)[0], lean(sizes))]
    return lambda rows: max(abs(ratio(rows) - 1.0) for ratio in found)


def _dropout_over_masks(sizes: Sizes) -> Callable[[Rows], float]:
    """Bytes that dropout adds to the peak, over those of masks of one bit for every element that it may drop."""
    config = sizes.config()
    inputs = 6 * config.hidden_size + config.intermediate_size
    masks = sizes.tokens * inputs * config.num_hidden_layers / 8
    lora, _, plain = (_peak(sizes, "peak_bytes", setting) for setting in settings(sizes)[:3])
    return lambda rows: (lora(rows) - plain(rows)) / masks


def kernel_goals(sizes: Sizes) -> list[Goal]:
    """Of single operators."""
    return [
        at_most("LoRA linears of a layer, 1 run, over the frozen ones", 1.06, "x", _lora_over_frozen(1)),
        at_most(
            f"LoRA linears of a layer, {sizes.runs} runs, over the frozen ones", 1.15, "x",
            _lora_over_frozen(sizes.runs),
        ),
        at_least("RMSNorm, SwiGLU, RoPE: least share of copy bandwidth", 0.85, "", _share_of_copy),
        Goal(
            "RMSNorm, SwiGLU, RoPE: most time over Liger's or torch.compile's, all sizes", 1.0, True, "x",
            _over_others(sizes), _others_note,
        ),
        at_most("head and cross-entropy", 27.0, " ms", read("micro", row_name(1), "ms")),
        at_most(
            "head and cross-entropy, extra memory", 0.6, " GB",
            lambda rows: rows["micro"][row_name(1)]["extra_bytes"] / GIGA,
        ),
        at_most("head and cross-entropy, error over that of the reference's rounding", 1.0, "x", _exact),
        at_most(
            f"head and cross-entropy, 1 label in {SPARSE}: time over the share of labels", PROPORTION, "x",
            _of_label_share,
        ),
        at_least(
            "attention without parents, the best library's time over ours", 0.95, "x",
            _attention_over_others, _attention_note,
        ),
        at_most("attention with parents, time a pair over that without", PROPORTION, "x", _time_a_pair),
        at_most("kernels that do not give the same bits twice", 0, "", _not_repeatable),
    ]  # fmt: skip


def step_goals(sizes: Sizes) -> list[Goal]:
    """Of training steps."""
    lora = settings(sizes)[0].name
    return [
        *(at_most(f"{name} step over {FROZEN}", 1.02, "x", _over_frozen_step(name)) for name in LIGHT),
        at_least("LoRA step, share of the matmul ceiling", 0.7, "", read("step", lora, "of_matmul_ceiling")),
        at_least(
            "the same in least memory (--activations cheap), share of the matmul ceiling", 0.7, "",
            read("step", lean(sizes).name, "of_matmul_ceiling"),
        ),
        at_least("LoRA step, speed over HF + PEFT", 1.8, "x", _speedup(lora, HF), _hf_note(HF)),
        at_least("LoRA step, speed over HF + PEFT + Liger", 1.4, "x", _speedup(lora, HF_LIGER), _hf_note(HF_LIGER)),
        at_most(
            f"losses of {sizes.losses[2]} steps beside HF + PEFT, error over twice theirs", 1.0, "x",
            read("step", losses.row_name(sizes), "error_over_budget"),
        ),
        at_most("trainings that do not give the same bits twice", 0, "", read("step", same_bits.ROW, "different")),
        at_least(
            "grid of runs together over HF Trainer + PEFT one after another", 5.0, "x",
            _grid_over(lambda rows: grid.theirs(rows["grid"])), _grid_note,
        ),
        at_least("grid of runs together over ours one after another", 2.0, "x", _grid_over(lambda rows: grid.ALONE)),
    ]  # fmt: skip


def other_goals(sizes: Sizes) -> list[Goal]:
    """Of decoding, scoring and memory."""
    return [
        at_least(
            "decode, batch 1, graph: share of copy bandwidth", 0.75, "",
            read("decode", decode.GRAPH, "of_copy_ceiling"),
        ),
        at_least(
            "classification prompts, shared prefix", 40_000, " tokens/s",
            read("decode", decode.PROMPTS, "prompt_tokens_per_second"),
        ),
        at_most(
            "peak memory of the step (--activations cheap)", 44.0, " GB",
            lambda rows: _peak(sizes, "peak_bytes", lean(sizes))(rows) / GIGA,
        ),
        at_most("memory, error of the prediction", 0.005, "", _misses(sizes)),
        at_most("memory, FLOPs of products computed again", 0, "", _peak(sizes, "recomputed_flops", lean(sizes))),
        at_most("memory that dropout adds over masks of one bit an element", ONE_BIT, "x", _dropout_over_masks(sizes)),
    ]  # fmt: skip


def goals(sizes: Sizes) -> list[Goal]:
    """All of them."""
    return [*kernel_goals(sizes), *step_goals(sizes), *other_goals(sizes)]


def report(rows: Rows, sizes: Sizes) -> list[dict[str, Any]]:
    """Every goal with its figure."""
    return [goal.report(rows) for goal in goals(sizes)]
