"""The command: measures the sections, prints the table, keeps the record."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peftdyno.bench.compare import product_section, step_sections, task_sections
from peftdyno.bench.compare.equal_work import UnequalWork
from peftdyno.bench.compare.inputs import positive, read_inputs
from peftdyno.bench.compare.link import WorkerError, available_cores
from peftdyno.bench.compare.record import Results, section_record
from peftdyno.bench.compare.sides import Plan, Sides, tell
from peftdyno.bench.compare.table import table
from peftdyno.bench.compare.turns import Row
from peftdyno.engine.errors import UserError, unknown

SECTIONS: dict[str, Callable[[Sides], list[Row]]] = {
    "step-128": step_sections.short_steps,
    "step-512": step_sections.long_steps,
    "training": task_sections.training,
    "seeds": task_sections.seeds,
    "together": task_sections.together,
    "evaluation": task_sections.evaluation,
    "generation": task_sections.generation,
    "memory": step_sections.memory,
    "products": product_section.products,
    "methods": step_sections.methods,
    "compile": step_sections.compiled,
}
"""Name -> what is measured, in the order of the table."""
ASKED_FOR = ("together",)
"""Sections that run only where they are named: they compare our side with itself."""
DEFAULT_OUT = Path("build/bench-cpu.json")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a section failed or sides did unequal work, 2 for wrong arguments."""
    options = parser().parse_args(words)
    try:
        names = chosen(options.only)
        results = Results(options.out)
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as scratch:
            measure(names, options, results, Path(scratch))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = results.rows(list(SECTIONS))
    print(table(rows))
    errors = results.errors(list(SECTIONS))
    for name, error in errors.items():
        print(f"\nFAILED {name}: {error}")
    for name, place in results.elsewhere(list(SECTIONS)).items():
        print(f"\nnot shown: {name}, measured on {place}")
    return 1 if errors or any(row.failed for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m peftdyno.bench.compare",
        description="Compare peftdyno on the CPU with transformers, PEFT and HF Trainer.",
        epilog="Example: python -m peftdyno.bench.compare --only step-128,memory --data DIR",
    )
    found.add_argument("--only", default="", help=f"sections, comma-separated: {', '.join(SECTIONS)}; others stay as "
                       "the file has them")  # fmt: skip
    found.add_argument("--repeats", type=positive, default=Plan.repeats, help="rounds kept of each comparison")
    found.add_argument("--steps", type=positive, help="steps a turn, or tokens where text is generated; each "
                       "section has its own")  # fmt: skip
    found.add_argument("--data", type=Path, help="folder of <task>/<split> files; generated tasks stand in without it")
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--threads", type=positive, default=available_cores(), help="of each side; all cores by default")
    found.add_argument("--compile-seconds", type=float, default=Plan.compile_seconds, help="time for torch.compile")
    found.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON record, %(default)s by default")
    return found


def chosen(only: str) -> list[str]:
    """Names of sections in the table's order; UserError with the closest names for an unknown one."""
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    wanted = wanted or [name for name in SECTIONS if name not in ASKED_FOR]
    for name in wanted:
        if name not in SECTIONS:
            raise unknown("section", name, SECTIONS)
    return [name for name in SECTIONS if name in wanted]


def measure(names: Sequence[str], options: argparse.Namespace, results: Results, scratch: Path) -> None:
    """Measure sections one after another, each kept as soon as it is done."""
    sides = open_sides(options, scratch)
    settings = {
        "model": options.model,
        "repeats": options.repeats,
        "steps": options.steps,
        "data": None if options.data is None else options.data.name,
        "environment": sides.environment,
    }
    try:
        for name in names:
            tell(f"{name} ...")
            start, rows, error = time.perf_counter(), [], ""
            try:
                rows = SECTIONS[name](sides)
            except (UnequalWork, WorkerError) as problem:
                error = str(problem)
                tell(f"  FAILED: {error}")
            seconds = time.perf_counter() - start
            results.put(name, section_record(rows, seconds, error, settings, options.threads))
            tell(f"  {name} took {seconds:.0f} s")
    finally:
        sides.close()


def open_sides(options: argparse.Namespace, scratch: Path) -> Sides:
    """Model, rows and processes; UserError where `read_inputs` raises it."""
    inputs = read_inputs(options.model, options.data)
    return Sides(
        model=inputs.model,
        classification=inputs.classification,
        reasoning=inputs.reasoning,
        plan=Plan(repeats=options.repeats, steps=options.steps, compile_seconds=options.compile_seconds),
        scratch=scratch,
        threads=options.threads,
    )


if __name__ == "__main__":
    sys.exit(main())
