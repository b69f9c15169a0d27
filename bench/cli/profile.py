"""`peftdyno profile`: where the time and memory of a training step go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Costs"
EXAMPLES = (
    "peftdyno profile --model smollm2-135m --method lora --batch 4 --seq 256 --out runs/profile",
    "peftdyno profile --model folder/with/config --method prefix-tuning --steps 20 --json",
    "peftdyno profile --model llama-3-8b --batch 1 --seq 512 --hardware",
)
ROWS = 20


def command(
    model: o.Model = None,
    method: Annotated[str, typer.Option("--method", help="See `peftdyno methods`.")] = "lora",
    batch: Annotated[int, typer.Option("--batch", help="Sequences in a step.", min=1)] = 1,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.", min=2)] = 256,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps, after warm-up.", min=1)] = 5,
    sets: o.Sets = None,
    dtype: o.Dtype = None,
    device: o.Device = None,
    hardware: Annotated[
        bool, typer.Option("--hardware", help="FLOPs and bytes by the card's own counters instead (Nsight Compute).")
    ] = False,
    out: o.Out = None,
    json_output: o.Json = False,
) -> None:
    """Time a training step by phase and operator, hold it against this machine's ceilings, and write traces for Chrome
    and TensorBoard and a page on memory. The model has random weights: no cost depends on their values."""
    from peftdyno.bench.base_model import choose_device
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.profiling.hardware import hardware_profile
    from peftdyno.bench.profiling.profile import profile
    from peftdyno.bench.profiling.spec import Spec

    place = choose_device(device or "auto")
    spec = Spec(
        model=model or o.DEFAULT_MODEL,
        method=method,
        sets=tuple(sets or ()),
        dtype=o.dtype(dtype),
        device=place.type,
        card=place.index or 0,
        batch=batch,
        length=seq,
    )
    folder = out or Path("runs") / "profile"
    found = hardware_profile(spec) if hardware else profile(spec.job(), batch, seq, steps, folder)
    if json_output:
        print_json(found)
    else:
        (_print_hardware if hardware else _print)(found)


def _print_hardware(found: dict[str, Any]) -> None:
    from peftdyno.bench.cli.console import OUT, print_table

    rows = [
        (
            phase,
            f"{values['counted_matrix_flops'] / 1e9:.3f}",
            f"{values['tensor_flops'] / 1e9:.3f}",
            f"{values['fma_flops'] / 1e9:.3f}",
            "" if values["counted_over_hardware"] is None else f"{values['counted_over_hardware']:.4f}",
            f"{values['counted_bytes_at_least'] / 1e6:.1f}",
            f"{values['dram_bytes'] / 1e6:.1f}",
        )
        for phase, values in found["phases"].items()
    ]
    header = (
        "phase",
        "counted matrix GFLOP",
        "tensor cores",
        "multiply-adds",
        "counted / hardware",
        "MB at least",
        "MB",
    )
    print_table(header, rows, title=f"Counted, and by the counters of {found['device']}")
    OUT.print("hardware above counted: tiles that reach over the edge of a matrix; --json has every kernel")


def _print(found: dict[str, Any]) -> None:
    from peftdyno.bench.cli.console import OUT, print_table

    times = [
        (phase, *(f"{1e3 * values[name]:.2f}" for name in ("median", "p10", "p90")))
        for phase, values in found["time"].items()
    ]
    print_table(("phase", "median, ms", "p10", "p90"), times, title=f"{found['steps']['timed']} timed steps")
    rows = [
        (
            row["phase"],
            row["operator"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['calls']}",
            f"{row['matrix_flops'] / 1e9:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['share_of_matmul']:.1%}",
            f"{row['share_of_copy']:.1%}",
        )
        for row in found["operators"][:ROWS]
    ]
    header = ("phase", "operator", "ms", "calls", "matrix GFLOP", "MB", "of matmul ceiling", "of copy ceiling")
    print_table(header, rows, title=f"The {len(rows)} slowest operators")
    memory = found["memory"]
    OUT.print(f"peak memory: predicted {memory['predicted_peak_bytes']:,} bytes, followed "
              f"{memory['followed_peak_bytes']:,}", highlight=False)  # fmt: skip
    energy, cost = found["energy"], found["accounting"]
    OUT.print(
        "energy: no counter can be read here"
        if energy is None
        else f"energy: {energy['joules_a_step']:.2f} J a step ({energy['source']}: {energy['covers']})"
    )
    microseconds = 1e6 * (cost["bookkeeping_seconds"] + cost["recording_seconds"])
    OUT.print(
        f"accounting: {microseconds:.0f} microseconds a step, {cost['share']:.2%} of it "
        f"({cost['allocations']} allocations recorded)",
        highlight=False,
    )
    OUT.print("wrote " + ", ".join(found["files"]), highlight=False)
