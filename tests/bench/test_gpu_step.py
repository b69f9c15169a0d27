"""Whole steps of the GPU machine's command: a short step as it is launched, and replayed by the stand-in recorder."""

import torch

from peftdyno.bench.gpu import step
from peftdyno.bench.gpu.sizes import FULL, TINY


def test_short_rows_are_launched_and_replayed() -> None:
    launched, replayed = step.short_settings(TINY)
    assert (launched.graphs, replayed.graphs) == (False, True) and launched.methods == replayed.methods
    assert step.short(FULL).tokens == 512
    rows = [step._step(s, step.short(TINY), torch.device("cpu"), tiny=True) for s in (launched, replayed)]
    assert all(row["seconds"] > 0 for row in rows) and rows[0]["flops"] == rows[1]["flops"] > 0
