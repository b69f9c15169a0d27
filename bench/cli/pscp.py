"""`peftdyno pscp`: the published PSCP tables, reproduced and corrected; or the PSCP of given figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftdyno.bench.cli import options as o

PANEL = "Compare"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno pscp --published",
    "peftdyno pscp --published --page published-pscp.md",
    "peftdyno pscp --score 80.1 --parameters 14680064 --tflop 0 --memory 25.9",
)


def command(
    published: Annotated[bool, typer.Option("--published", help="The tables of arXiv:2511.21285.")] = False,
    page: Annotated[Path | None, typer.Option("--page", help="Write them as a Markdown page.")] = None,
    score: Annotated[float | None, typer.Option("--score", help="Mean task score in percent.")] = None,
    parameters: Annotated[float | None, typer.Option("--parameters", help="Trainable parameters.")] = None,
    tflop: Annotated[float | None, typer.Option("--tflop", help="Inference TFLOP above the base model's.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="Peak training memory in GB.")] = None,
    json_output: o.Json = False,
) -> None:
    """Reproduce the published PSCP tables and what changes when their inputs are put right, or compute one PSCP."""
    from peftdyno.engine.errors import UserError

    given = {"--score": score, "--parameters": parameters, "--tflop": tflop, "--memory": memory}
    missing = [name for name, value in given.items() if value is None]
    if published and len(missing) == len(given):
        _published(page, json_output)
        return
    if published or page is not None:
        raise UserError("--page goes with --published, and --published with none of --score, --parameters, ...")
    if missing:
        raise UserError(f"{', '.join(missing)} missing; give all of {', '.join(given)}, or --published")
    assert score is not None and parameters is not None and tflop is not None and memory is not None
    _compute(score, parameters, tflop, memory, json_output)


def _published(page: Path | None, json_output: bool) -> None:
    from peftdyno.bench import published as figures
    from peftdyno.bench.cli.console import print_json

    if page is not None:
        figures.write_page(page)
        if not json_output:
            print(f"wrote {page}")
            return
    if json_output:
        print_json(figures.as_json())
    else:
        print(figures.text(), end="")


def _compute(score: float, parameters: float, tflop: float, memory: float, json_output: bool) -> None:
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.pscp import factors, pscp

    value, parts = pscp(score, parameters, tflop, memory), factors(parameters, tflop, memory)
    if json_output:
        print_json({"pscp": value, "factors": parts})
        return
    print(f"PSCP {value:.2f} = {score:g}" + "".join(f" x {part:.4f} ({name})" for name, part in parts.items()))
