"""`python -m host_gpu.run LIBRARY REPORT COMMAND...`: a command line of peftdyno on the device."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host_gpu import cuda


def main(library: Path, report: Path, command: list[str]) -> int:
    """Run it, and write to `report` what was seen of the device."""
    os.environ["TRITON_INTERPRET"] = "1"
    cuda.load(library)
    cuda.install()
    from host_gpu import recording

    recording.install()
    from peftdyno.bench.cli import run
    from peftdyno.bench.profiling import ceiling

    ceiling.SIZES["cuda"] = 256  # a GPU's own size would take this one minutes
    steps = _watched_steps()
    sys.argv = ["peftdyno", *command]
    status = run(command, "peftdyno")
    report.write_text(json.dumps({"steps": steps}))
    return status


def _watched_steps() -> list[dict[str, int]]:
    """For each step that a training will make, how often it waits for the device, and how many graphs it replays."""
    from host_gpu import recording

    from peftdyno.engine import train

    steps: list[dict[str, int]] = []

    def watched(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            waits, replays = cuda.waits(), recording.replays
            result = part(*args)
            steps[-1]["waits"] += cuda.waits() - waits
            steps[-1]["replays"] += recording.replays - replays
            return result

        return run

    backward, update = watched(train.forward_backward), watched(train._update)

    def begun(*args: Any) -> Any:
        steps.append({"waits": 0, "replays": 0})
        return backward(*args)

    train.forward_backward, train._update = begun, update  # type: ignore[assignment]
    return steps


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # PyTorch's threads of a GPU do not end by themselves
