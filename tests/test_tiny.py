"""The front door: two methods, two runs each, a few steps on a tiny model, against golden losses.

`make golden` writes the losses anew (PEFTDYNO_GOLDEN=write).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.train import TrainConfig, train

from .engine.tiny_job import job, tiny_decoder

GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_losses_are_the_golden_ones(name, tmp_path):
    decoder = tiny_decoder()
    bank = AdapterBank.create(decoder.config, [METHODS[name]()] * 2, [1, 2], decoder.weights)
    train(decoder, bank, [job(steps=6), job(steps=6, seed=4)], TrainConfig(evaluate_every=0), tmp_path)
    found = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("PEFTDYNO_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(golden | {name: found}, indent=1) + "\n")
        pytest.skip("golden losses written")
    for ours, theirs in zip(found, golden[name], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
