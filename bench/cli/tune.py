"""`peftdyno tune`: measure the GPU kernels at a model's shapes and keep the fastest choices for this GPU."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Costs"
EXAMPLES = (
    "peftdyno tune --model llama-3-8b",
    "peftdyno tune --model llama-3-8b --only attention --tokens 512 --tokens 4096",
)


def command(
    model: o.Model = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", help="Tokens of a pack, 8192; again for more.", min=16)
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="LoRA's rank, on every projection.", min=1)] = 16,
    runs: Annotated[int, typer.Option("--runs", help="Runs trained together in one bank.", min=1)] = 1,
    only: Annotated[str, typer.Option("--only", help="Part of a kernel's or operator's name.")] = "",
    json_output: o.Json = False,
) -> None:
    """Tune tiles and forms of the GPU kernels; training and generation then take them, and tune nothing themselves."""
    import torch

    from peftdyno.bench.cli.console import print_json, print_table
    from peftdyno.engine.errors import UserError
    from peftdyno.engine.sources import resolve_config
    from peftdyno.kernels import tuning

    if not torch.cuda.is_available():
        raise UserError(
            "tune measures kernels and PyTorch sees no CUDA device here; without it a GPU takes the choices shipped "
            "for sm_80, sm_90 and sm_100 (see peftdyno env)"
        )
    from peftdyno.bench.tuning import tune_sizes
    from peftdyno.kernels.triton import tune

    device = torch.device("cuda", torch.cuda.current_device())
    config = resolve_config(model or o.DEFAULT_MODEL)

    def keep(name: str, entry: dict[str, Any]) -> None:
        tuning.save(device, {name: entry})
        if not json_output:
            _say(name, entry)

    found: dict[str, dict[str, Any]] = {}
    for count in tokens or (8192,):
        found |= tune.tune(tune_sizes(config, tokens=count, rank=rank, runs=runs), device, only, report=keep)
    if not found:
        raise UserError(f"--only {only}: no kernel's name contains it; see peftdyno env")
    file = tuning.cache_file(device)
    if json_output:
        print_json(
            {name: entry for name, entry in tuning.picked(device).items() if name in found} | {"file": str(file)}
        )
        return
    print_table(("kernel or operator", "picked"), [(n, p) for n, p in tuning.picked(device).items() if n in found])
    print(f"kept in {file}")


def _say(name: str, entry: dict[str, Any]) -> None:
    """An entry as it is found, on stderr."""
    import sys

    if "tile" in entry:
        text = f"{entry['ms']:.3f} ms, {entry['shipped_ms']:.3f} as shipped"
    else:
        text = ", ".join(f"{form} {'wrong' if ms is None else f'{ms:.3f} ms'}" for form, ms in entry["ms"].items())
    print(f"{name}: {text}", file=sys.stderr, flush=True)
