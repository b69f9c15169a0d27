"""One training step, each phase inside an NVTX range of its name, for a profiler outside to look at.

python -P -m peftdyno.bench.profiling.one_step SPEC, where SPEC is a `Spec` as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.profiling.spec import Spec
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Owner, Phase


class MarkedLedger(Ledger):
    """A ledger that is off, and marks phases; ranges of the whole process, as backward runs on a thread of its own."""

    @contextmanager
    def phase(self, name: Phase, *, owner: Owner = "base", layer: int | None = None) -> Iterator[None]:
        torch.cuda.synchronize()
        mark = torch.cuda.nvtx.range_start(name)
        with super().phase(name, owner=owner, layer=layer):
            yield
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_end(mark)


def main(text: str) -> None:
    """A step that compiles what must be compiled, then one that is marked."""
    values = json.loads(text)
    spec = Spec(**{**values, "sets": tuple(values["sets"])})
    torch.cuda.set_device(spec.card)
    bench = Bench.of(spec.job(), spec.batch, spec.length)
    for ledger in (Ledger, MarkedLedger):
        bench.step(ledger(bench.decoder.scope, on=False))


if __name__ == "__main__":
    main(sys.argv[1])
