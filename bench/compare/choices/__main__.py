"""The command: measures subjects, prints their tables, keeps the record."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftdyno.bench.compare.choices.lines import table
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.choices.subjects import SUBJECTS
from peftdyno.bench.compare.inputs import positive, read_inputs
from peftdyno.bench.compare.link import Worker, WorkerError, available_cores, thread_environment
from peftdyno.bench.compare.record import Results, section_record
from peftdyno.bench.compare.sides import tell
from peftdyno.engine.errors import UserError

MODULE = "peftdyno.bench.compare.choices"
REPEATS = 7
DEFAULT_OUT = Path("build/choices.json")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a subject failed, 2 for wrong arguments."""
    options = parser().parse_args(words)
    try:
        names = chosen(options.names)
        results = Results(options.out)
        if not options.show:
            measure(names, options, results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown(results, names))
    errors = results.errors(names)
    for name, error in errors.items():
        print(f"\nFAILED {name}: {error}")
    return 1 if errors else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog=f"python -P -m {MODULE}",
        description="Measure the alternatives that stand behind the decisions in docs/, on the CPU, in turns.",
        epilog=f"Example: python -P -m {MODULE} products decode --data DIR",
    )
    found.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUBJECTS)}; all without a name")
    found.add_argument("--repeats", type=positive, default=REPEATS, help="rounds kept, %(default)s by default")
    found.add_argument("--data", type=Path, help="folder of <task>/<split> files; generated tasks stand in without it")
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--threads", type=positive, default=available_cores(), help="all cores by default")
    found.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON record, %(default)s by default")
    found.add_argument("--show", action="store_true", help="measure nothing; print the tables of the record")
    return found


def chosen(names: Sequence[str]) -> list[str]:
    """Names of subjects in the order of the tables; UserError with all of them for an unknown one."""
    for name in names:
        if name not in SUBJECTS:
            raise UserError(f"unknown NAME '{name}'; give some of {', '.join(SUBJECTS)}")
    return [name for name in SUBJECTS if name in names or not names]


def measure(names: Sequence[str], options: argparse.Namespace, results: Results) -> None:
    """Measure subjects one after another, each in a process of its own and kept as soon as it is done."""
    inputs = read_inputs(options.model, options.data)
    texts, prompts = inputs.classification.train, inputs.reasoning.prompts
    setting = Setting(model=inputs.model, texts=texts, prompts=prompts, repeats=options.repeats)
    known = {"model": options.model, "data": None if options.data is None else options.data.name}
    known |= {"repeats": setting.repeats, "sizes": asdict(setting.sizes)}
    for name in names:
        tell(f"{name} ...")
        start = time.perf_counter()
        lines, error = measured(name, setting, options.threads)
        seconds = time.perf_counter() - start
        record = section_record([], seconds, error, known, options.threads, MODULE)
        results.put(name, {**record, "lines": lines})
        tell(f"  FAILED: {error}" if error else f"  {name} took {seconds:.0f} s")


def measured(name: str, setting: Setting, threads: int) -> tuple[dict[str, Any], str]:
    """Records of a subject's lines, and what went wrong."""
    worker = Worker(name, thread_environment(threads))
    try:
        worker.open("choices", name=name, setting=asdict(setting))
        return worker.call("measure"), ""
    except WorkerError as error:
        return {}, str(error)
    finally:
        worker.close()


def shown(results: Results, names: Sequence[str]) -> str:
    """Tables of the subjects in the record, each below its name, when and at which commit it was measured."""
    parts = []
    for name in names:
        found = results.sections.get(name)
        if found is not None and found["lines"]:
            commit = found["git"]["commit"][:9] if found["git"] else "unknown"
            settings = f"{found['settings']['repeats']} rounds, {found['machine']['threads']} threads"
            parts.append(f"## {name}\n{found['finished']}, commit {commit}, {settings}\n\n{table(found['lines'])}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
