"""What the page says of the printed figures: every figure in it computed."""

from __future__ import annotations

from . import costs, tables
from .section import Section, Table, names, setting
from .source import published


def reproduction() -> Section:
    """The printed tables beside the recomputed ones."""

    constants = published().constants
    rows = []
    for table in published().tables:
        ours = tables.reproduced(table)
        cells = [f"{v:.2f}" if ours[m] == v else f"{v:.2f} (ours {ours[m]:.2f})" for m, v in table.pscp.items()]
        rows.append([setting(table.exponents), *cells])
    bitfit = " and ".join(
        f"{tables.reproduced(table)['bitfit']:.2f} at exponents {setting(table.exponents)}"
        for table in published().bitfit
    )
    return Section(
        "The printed tables",
        [
            "PSCP = P (1 + Mp/Cp)^-bp (1 + Mf/Cf)^-bf (1 + Mm/Cm)^-bm, with P the mean score in percent, "
            "Mp the trainable parameters, Mf the inference TFLOP above the base model's for one sequence "
            f"of {published().tokens} tokens, Mm the mean peak training memory in GB. Cp = "
            f"{constants.parameters:g}, Cf = {constants.tflop:g}, Cm = {constants.memory_gb:g}. Model: "
            f"{published().model}. Source: {published().source['tables']}.",
            f"From the printed inputs, {tables.agreement()} figures come out with the printed digits. Where "
            "one does not, ours stands beside it. Exponents are in the order bp, bf, bm.",
            Table(["exponents", *published().tables[0].pscp], rows),
            f"BitFit has no printed row; from the inputs in the benchmark's repository it comes to {bitfit}.",
        ],
    )


def _printed_tflop(method: str) -> float:
    return published().base_tflop if method == "base" else published().inference_tflop[method]


def _profiler_row(method: str) -> list[str]:
    count = costs.profiler_count(method)
    cells = (count.exact, count.norms, count.scales, count.total)
    return [method, *(f"{value:.3f}" for value in cells), f"{_printed_tflop(method):.2f}"]


def profiler() -> Section:
    """Why every printed FLOP figure is what it is."""
    shape, tokens = published().shape, published().tokens
    norms, width = costs.num_norms(shape), shape.hidden
    base, ia3 = costs.profiler_count("base"), costs.profiler_count("ia3")
    true_ia3 = [costs.pointwise_flop("ia3", down_scaled_at=end) / 1e12 for end in ("output", "input")]
    lora = costs.extra_tflop("lora", "full")
    matrix = costs.exact_tflop("lora", "full") - base.exact
    kv = costs.linears(shape)["k"][1]
    encoder = costs.exact_tflop("p-tuning", "full") - costs.exact_tflop("prompt-tuning", "full")
    methods = ("base", *published().methods)
    rows = [_profiler_row(method) for method in methods]
    agree = sum(round(costs.profiler_count(m).total, 2) == _printed_tflop(m) for m in methods)
    return Section(
        "Where the printed FLOPs come from",
        [
            f"Counted exactly, one sequence of {tokens} tokens costs the base model "
            f"{costs.exact_flop('base', 'full'):,} FLOPs with attention as a full square, and "
            f"{costs.exact_tflop('base', 'causal'):.5f} TFLOP over the pairs that causal attention has (2 "
            f"for each multiply-add, head included); {published().base_tflop:.2f} is printed. The counts "
            "came from a common profiler, DeepSpeed's, whose releases up to 0.16.9 lined up the shapes of "
            "a pointwise product from the left: a slip in the tool, not in the benchmark, and mended there "
            f"since. The table adds up the exact count and what that rule adds; {agree} of {len(rows)} sums "
            "round to the printed figure.",
            Table(["TFLOP", "exact", "+ norms", "+ scales", "= sum", "printed"], rows),
            f"Norms: a weight of {width} values times an activation of 1 x {tokens} x {width} is {tokens} x "
            f"{width} products; lined up from the left it counts as {width} x {tokens} x {width}. The "
            f"{norms} norms add {norms} x {tokens} x {width}^2 = {base.norms:.3f} TFLOP. All methods share "
            "it, so at equal length it cancels in PSCP; the soft prompts' longer sequences carry more of "
            "it.",
            f"IA3: its scales count the same way, {shape.layers} x {tokens} x ({kv}^2 + {kv}^2 + {width}^2) "
            f"= {ia3.scales:.3f} TFLOP. They really take {true_ia3[0]:.4f} ({true_ia3[1]:.4f} if down_proj "
            "is scaled at its input), and nothing once merged into the weights.",
            "LoRA: printed equal to the base, because the model was profiled without an adapter. That is "
            f"the right figure for merged weights. Unmerged, its matrix products cost {matrix:.5f} TFLOP, "
            f"and the additions to the outputs bring it to {lora:.5f}.",
            f"Prompt tuning and P-tuning: {published().settings.prompt_tokens} tokens join every sequence, "
            f"so {tokens + published().settings.prompt_tokens} are computed: "
            f"{costs.exact_tflop('prompt-tuning', 'full'):.5f} TFLOP, "
            f"{costs.extra_tflop('prompt-tuning', 'full'):.2f} above the base; the printed difference is "
            f"{published().printed_inputs('prompt-tuning').tflop:.2f}. P-tuning's printed figure also runs "
            f"its encoder ({encoder:.4f}), which can be run once and its output kept.",
            f"Prefix tuning: {published().settings.prefix_tokens} further rows of keys and values in every "
            f"layer, {costs.extra_tflop('prefix-tuning', 'full', merged=True):.4f} TFLOP, and "
            f"{costs.extra_tflop('prefix-tuning', 'full'):.4f} with the projection that makes them.",
        ],
    )


def _omission_text(method: str) -> str:
    """The fewest data sets whose omission gives the printed mean."""
    found = tables.omissions(method)
    if found[0]:
        return "all data sets"
    choices = [" and ".join(choice) for choice in found[1] or found[2]]
    return f"all but {' or '.join(choices)}" if choices else "no one or two left out"


def means() -> Section:
    """Which data sets the printed means are over."""
    count = len(published().datasets)
    rows = [
        [m, f"{published().performance[m]:.1f}", f"{tables.mean_score(m):.2f}", _omission_text(m)]
        for m in published().scored
    ]
    without = [m for m in published().scored if tables.omissions(m)[1] == [("apps",)]]
    gains = [f"{published().performance[m] - tables.mean_score(m):.1f}" for m in without]
    apps = [published().scores[m]["apps"] for m in published().scored]
    return Section(
        "Means over different data sets",
        [
            f"The paper prints a score for each method on each of {count} data sets. The mean that enters "
            "PSCP is not over the same ones for every method. The script that gathers results passes over "
            "runs it does not find, so a mean taken before all runs were in would be over fewer data sets.",
            Table(["method", "printed mean", f"mean of {count}", "the printed mean fits"], rows),
            f"Leaving out apps, where the methods score {min(apps):.1f} to {max(apps):.1f}, raises the "
            f"means of {names(without)} by {names(gains)} points. IA3's mean includes it. A choice of one "
            f"or two among {count} that fits can also be chance, and where none fits the printed scores do "
            "not tell how the mean came about.",
        ],
    )


def parameters() -> Section:
    """The parameter counts, and the two that depend on a reading of the configuration."""
    lstm, mlp = (costs.trainable_parameters("p-tuning", encoder=e) for e in ("LSTM", "MLP"))
    printed = published().printed_inputs("p-tuning")
    swapped = tables.mlp_encoder(printed).pscp(constants=published().constants)
    values = tables.printed_pscp()
    output, inside = (costs.trainable_parameters("ia3", down_scaled_at=end) for end in ("output", "input"))
    shape = published().shape
    agree = sum(costs.trainable_parameters(m) == published().parameters[m] for m in published().methods)
    return Section(
        "Trainable parameters",
        [
            f"{agree} of {len(published().methods)} printed counts follow from the model's sizes. Two "
            "depend on how the method was set up.",
            f"P-tuning: {lstm:,} is the count with an LSTM encoder, which the profiling and evaluation "
            "configurations in the repository name. The training configuration names an MLP, which has "
            f"{mlp:,}. If the trained runs used it, P-tuning's PSCP from the printed inputs is "
            f"{swapped:.2f}, not {values['p-tuning']:.2f}, above prompt tuning's "
            f"{values['prompt-tuning']:.2f}. We cannot tell which was trained, so the corrected tables show "
            "both.",
            "IA3: the configuration gives its feed-forward module as a string, which the library compares "
            "with the whole module path and does not match. down_proj was therefore scaled at its output: "
            f"{shape.layers} x ({costs.linears(shape)['k'][1]} + {costs.linears(shape)['v'][1]} + "
            f"{shape.hidden}) = {output:,} parameters. As the method defines it, at the input, there are "
            f"{inside:,}. The printed scores belong to the first, and so does the count used here.",
        ],
    )
