"""Scoring: independent of the batch, continued after a kill, and never mixing rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftdyno.bench.base_model import load_base
from peftdyno.bench.data import load_test
from peftdyno.bench.evaluate import evaluate
from peftdyno.bench.tasks import get_task
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.errors import UserError

TASK = replace(get_task("sst2"), max_new_tokens=6)


@pytest.fixture(scope="module")
def base(tiny_model: Path):
    return load_base(str(tiny_model), "fp32", "cpu")


@pytest.fixture(scope="module")
def rows(tiny_data: Path):
    return load_test(TASK, tiny_data).rows


def tuned(base, runs: int) -> AdapterBank:
    """A bank whose runs differ from the base model and from each other."""
    bank = AdapterBank.create(base.decoder.config, [METHODS["lora"]()] * runs, range(runs), base.decoder.weights)
    with torch.no_grad():
        bank.flat.normal_(0.0, 0.3)
    return bank


def predict(base, bank, rows, files, batch):
    found = evaluate(base.decoder, bank, base.tokenizer, TASK, rows, files, batch=batch, max_length=256)
    return [one.predictions for one in found]


def test_predictions_do_not_depend_on_the_batch(base, rows, tmp_path: Path) -> None:
    bank = tuned(base, 1)
    found = [predict(base, bank, rows, [tmp_path / f"{batch}.jsonl"], batch)[0] for batch in (1, 2, 8)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1, "the model should answer differently to different rows"


def test_adapters_together_answer_as_apart(base, rows, tmp_path: Path) -> None:
    both = tuned(base, 2)
    together = predict(base, both, rows, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], 4)
    for run in range(2):
        alone = AdapterBank.from_tensors(
            base.decoder.config, [both.methods[run]], [both.run_tensors(run)], base.decoder.weights
        )
        assert predict(base, alone, rows, [tmp_path / f"alone-{run}.jsonl"], 4)[0] == together[run]
    assert together[0] != together[1]


def test_killed_scoring_continues(base, rows, tmp_path: Path) -> None:
    bank = tuned(base, 2)
    whole = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    expected = predict(base, bank, rows, whole, 4)
    cut = [tmp_path / "c.jsonl", tmp_path / "d.jsonl"]
    lines = whole[0].read_bytes().splitlines(keepends=True)
    cut[0].write_bytes(b"".join(lines[:4]) + lines[4][:9])
    cut[1].write_bytes(b"".join(whole[1].read_bytes().splitlines(keepends=True)[:7]))
    seen = []
    found = evaluate(
        base.decoder, bank, base.tokenizer, TASK, rows, cut, batch=4, max_length=256,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [one.predictions for one in found] == expected
    assert [path.read_bytes() for path in cut] == [path.read_bytes() for path in whole]
    assert seen == [(8, 10), (10, 10)]


def test_finished_scoring_computes_nothing(base, rows, tmp_path: Path, monkeypatch) -> None:
    bank, path = tuned(base, 1), tmp_path / "a.jsonl"
    expected = predict(base, bank, rows, [path], 4)
    monkeypatch.setattr("peftdyno.bench.evaluate.generate", None)
    assert predict(base, bank, rows, [path], 4) == expected


def test_other_rows_are_refused(base, rows, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"row": 0, "prediction": "x", "answers": ["something else"]}) + "\n")
    with pytest.raises(UserError, match="predictions of other rows"):
        predict(base, tuned(base, 1), rows, [path], 4)


def test_scores_and_cuts(base, rows, tmp_path: Path) -> None:
    limit = TASK.max_new_tokens + 20
    found = evaluate(
        base.decoder, base.untuned(), base.tokenizer, TASK, rows, [tmp_path / "a"], batch=4, max_length=limit
    )
    assert found[0].num_cut == len(rows)
    assert set(found[0].scores) == {"corrected", "published"}
    assert 0 <= found[0].scores["corrected"]["f1"] <= 1
    with pytest.raises(UserError, match="leaves no room"):
        evaluate(base.decoder, base.untuned(), base.tokenizer, TASK, rows, [tmp_path / "b"], batch=4, max_length=6)
