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
    out: o.Out = None,
    json_output: o.Json = False,
) -> None:
    """Time a training step by phase and operator, hold it against this machine's ceilings, and write a Chrome trace
    and a page on memory. The model has random weights: no cost depends on their values."""
    import torch

    from peftdyno.bench.base_model import choose_device
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.profiling.profile import profile
    from peftdyno.bench.settings import gather, make_settings
    from peftdyno.engine.accounting.predict import Job
    from peftdyno.engine.sources import resolve_config

    name = model or o.DEFAULT_MODEL
    values = gather({"model": name, "method": method, "task": "profile"}, None, sets or [])
    built = make_settings(values).build_method()
    width = {"bf16": torch.bfloat16, "fp32": torch.float32}[o.dtype(dtype)]
    where = choose_device(device or "auto")
    job = Job(config=resolve_config(name), methods=(built,), dtype=width, device=where.type)
    found = profile(job, batch, seq, steps, out or Path("runs") / "profile")
    if json_output:
        print_json(found)
    else:
        _print(found)


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
    energy = found["energy_joules_a_step"]
    OUT.print("energy: no counter can be read here" if energy is None else f"energy: {energy:.2f} J a step")
    OUT.print("wrote " + ", ".join(found["files"]), highlight=False)
