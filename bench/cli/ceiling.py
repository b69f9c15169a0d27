"""`peftdyno ceiling`: how fast this machine multiplies matrices and copies memory, measured once and kept."""

from __future__ import annotations

from typing import Annotated

import typer

from peftdyno.bench.cli import options as o

PANEL = "Costs"
EXAMPLES = ("peftdyno ceiling", "peftdyno ceiling --again --json")


def command(
    device: o.Device = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even where it was done before.")] = False,
    json_output: o.Json = False,
) -> None:
    """Measure the ceilings that `peftdyno profile` holds operators against."""
    from peftdyno.bench.base_model import choose_device
    from peftdyno.bench.cli.console import print_json, print_table
    from peftdyno.bench.profiling.ceiling import ceilings

    found = ceilings(choose_device(device or "auto"), again=again)
    if json_output:
        print_json(found)
        return
    rows = [(f"matrix product, {name}", f"{value / 1e12:.3f} TFLOP/s") for name, value in found["matmul_flops"].items()]
    rows.append(("copy, read and write", f"{found['copy_bytes'] / 1e9:.2f} GB/s"))
    print_table(("ceiling", ""), rows, title=f"{found['device']}, measured {found['measured']}")
