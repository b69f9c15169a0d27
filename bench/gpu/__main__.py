"""`bench/gpu.sh [--only SECTION] [--out FOLDER] [--tiny]`: run the sections, print a table, leave JSON beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

SECTIONS = ("tune", "kernels", "micro", "grid", "step", "decode", "memory")
"""In the order they run in: `step` ends with a row that patches transformers for the rest of the process."""
ON_REQUEST = "tune"
"""Takes several calls, and what it finds changes every figure after it: it runs first, and only where it is named."""
SECONDS = 450.0
"""A section starts no new row after this; the next call goes on with what is left."""


def options(arguments: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__.split(": ")[1])  # type: ignore[union-attr]
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="a section (may be repeated); all but tune otherwise"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; without a GPU, in Triton's interpreter")
    parser.add_argument("--fresh", action="store_true", help="forget rows measured before")
    return parser.parse_args(arguments)


def provenance(device: Any, *, tiny: bool) -> dict[str, Any]:
    """Where the figures come from."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "interpreted": device.type != "cuda",
        "tiny": tiny,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": _commit(),
        "command": " ".join(sys.argv[1:]),
    }


def _commit() -> str | None:
    """That of the checkout; None where there is none, or no git to ask."""
    here = str(Path(__file__).resolve().parent)
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def main(arguments: list[str]) -> int:
    """Run what is asked for; 0 where every check passed and nothing is left over."""
    chosen = options(arguments)
    import torch

    if not torch.cuda.is_available():
        if not chosen.tiny:
            print("no CUDA device: run it on a GPU machine, or give --tiny for a smoke test", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"
    from peftdyno.bench.gpu import checks, decode, goals, grid, memory, micro, step, tune
    from peftdyno.bench.gpu.goal import lines
    from peftdyno.bench.gpu.results import DeviceLost, Section, brief
    from peftdyno.bench.gpu.sizes import FULL, TINY
    from peftdyno.kernels import dispatch, tuning

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dispatch.use("triton")
    modules = {"kernels": checks, "micro": micro, "grid": grid, "step": step, "decode": decode, "memory": memory}
    modules |= {"tune": tune}
    sizes = TINY if chosen.tiny else FULL
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(chosen.out.resolve() / "cache")  # what is tuned here, and nothing else, counts
    report = {"provenance": provenance(device, tiny=chosen.tiny)}
    sections = []
    for name in [name for name in SECTIONS if name in (chosen.only or set(SECTIONS) - {ON_REQUEST})]:
        sections.append(Section.open(name, chosen.out, SECONDS, fresh=chosen.fresh))
        try:
            modules[name].run(sections[-1], sizes, device, tiny=chosen.tiny)
        except DeviceLost as error:
            print(f"the GPU failed, so what is left waits for the next call: {error}", file=sys.stderr)
            break
    tuned = tuning.measured(device) != tuning.Measured()
    report |= {"tuned": tuned, "choices": tuning.picked(device)}
    report |= {s.name: {"rows": list(s.rows.values()), "left": s.left} for s in sections}
    everything = {name: Section.open(name, chosen.out, SECONDS, fresh=False).rows for name in SECTIONS}
    report["goals"] = goals.report(everything, sizes)
    (chosen.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    status = summary(sections, brief, interpreted=device.type != "cuda")
    counts = device.type == "cuda" and not chosen.tiny
    title = f"goals on one H200, {'with what --only tune found' if tuned else 'untuned'}"
    title += "" if counts else ", with figures of a smoke test, which decide nothing"
    print("\n".join([title, *lines(report["goals"], counts=counts)]))
    return status


def summary(sections: list[Any], brief: Any, *, interpreted: bool) -> int:
    """The short table: failures and what is left of each section, and its rows but for passed checks."""
    print("\n" + ("SMOKE TEST in the interpreter: its times say nothing\n" if interpreted else ""))
    failed = 0
    for section in sections:
        rows = section.rows.values()
        wrong = [row for row in rows if row.get("ok") is False]
        failed += len(wrong)
        print(f"{section.name}: {len(rows)} rows, {len(wrong)} wrong, {len(section.left)} left")
        for row in wrong:
            print(f"  WRONG {row['name']}  {row.get('failed', '')}".rstrip())
        for row in rows:
            if "ok" not in row:
                print(f"  {row['name']:<56}{brief({k: v for k, v in row.items() if k != 'name'})}")
    return int(failed > 0 or any(section.left for section in sections))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
