"""The program of a worker process: opens a job and calls its methods as the parent's JSON lines ask."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from typing import Any

from peftdyno.engine.errors import first_line, unknown

JOBS = {
    "ours.steps": "ours_steps:OurSteps",
    "ours.training": "ours_training:OurTraining",
    "ours.long_training": "ours_training:LongTraining",
    "ours.generation": "ours_generation:OurGeneration",
    "ours.scoring": "ours_scoring:OurScoring",
    "ours.products": "products:Products",
    "plain.steps": "plain_loop:PlainSteps",
    "trainer.training": "hf_trainer:TrainerRuns",
    "transformers.generation": "hf_generation:Generation",
    "choices": "choices.subjects:Subject",
}
"""Job -> module of this folder and class; a job's public methods take and return what JSON can say."""


def job_class(name: str) -> Any:
    """The class of a job; UserError with the closest names otherwise."""
    if name not in JOBS:
        raise unknown("job", name, JOBS)
    module, _, cls = JOBS[name].partition(":")
    return getattr(importlib.import_module(f"peftdyno.bench.compare.{module}"), cls)


class Session:
    """The job that is open."""

    def __init__(self) -> None:
        self.job: Any = None

    def serve(self, request: dict[str, Any]) -> Any:
        """Answer one request."""
        arguments = request["arguments"]
        if "open" in request:
            self.job = None
            gc.collect()
            self.job = job_class(request["open"])(**arguments)
            return None
        method = request["call"]
        assert not method.startswith("_"), method
        return getattr(self.job, method)(**arguments)


def main() -> None:
    """Serve until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    session = Session()
    for line in sys.stdin:
        try:
            reply = {"result": session.serve(json.loads(line))}
        except Exception as error:  # the parent decides what a failed job means
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {first_line(error)}"}
        try:
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
