"""`peftdyno env`: the machine, the versions, and which kernels run."""

from __future__ import annotations

from typing import Any

from peftdyno.bench.cli import options as o

PANEL = "Look"
EXAMPLES = ("peftdyno env", "peftdyno env --json")


def command(json_output: o.Json = False) -> None:
    """Show what a run's record will say of this machine."""
    from peftdyno.bench import machine
    from peftdyno.bench.cli.console import print_json, print_table
    from peftdyno.engine.model_cache import cache_folder
    from peftdyno.kernels.cpu import describe

    found: dict[str, Any] = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "git": machine.git(),
        "cpu_kernels": describe(),
        "gpu_kernels": _gpu_kernels(),
        "operators": _operators(),
        "model_cache": str(cache_folder()),
    }
    if json_output:
        print_json(found)
        return
    rows = [(f"{name}.{key}", str(inner)) for name, part in found.items() if isinstance(part, dict)
            for key, inner in part.items()]  # fmt: skip
    rows += [(name, str(value)) for name, value in found.items() if not isinstance(value, dict)]
    print_table(("", ""), rows)


def _gpu_kernels() -> dict[str, str] | str:
    """Tile of each kernel and form of each operator with why, or why there are none."""
    import importlib.util

    import torch

    from peftdyno.kernels import tuning

    if not torch.cuda.is_available():
        return "none: PyTorch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "none: Triton is not installed; operators run as plain PyTorch"
    device = torch.device("cuda", torch.cuda.current_device())
    return {"choices": str(tuning.cache_file(device)), **tuning.picked(device)}


def _operators() -> dict[str, str]:
    """The implementation that each operator takes on this machine's fastest device, with why."""
    import torch

    from peftdyno.kernels import dispatch
    from peftdyno.kernels.library import every_primitive

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: dispatch.explain(name, made.implementations, device) for name, made in sorted(every_primitive().items())
    }
