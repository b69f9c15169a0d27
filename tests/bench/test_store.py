"""Records: they survive a round trip, and broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftdyno.bench.store import RunRecord, finished_record, read_record, write_record
from peftdyno.engine.errors import UserError


def record(**more) -> RunRecord:
    """A made-up record; its figures mean nothing."""
    values = {
        "fingerprint": "f",
        "finished": "2025-01-01T00:00:00+00:00",
        "command": "peftdyno train",
        "versions": {"torch": "2"},
        "machine": {"processor": "p", "threads": 1},
        "model": {"name": "m"},
        "method": {"name": "lora", "settings": {"rank": 8, "layers_to_transform": None}},
        "task": {"name": "sst2", "metric": "f1"},
        "seed": 1,
        "settings": {"batch": 4},
        "steps": 10,
        "parameters": {"trainable": 5, "stored": 5, "total": 50},
        "memory": {"resident_peak_bytes": 2 * 10**9},
        "time": {"training": 4.0, "step_median": 0.4},
        "loss": {"first": 2.0, "last": None},
        "scores": {"corrected": {"f1": 0.5}, "published": {"f1": None}},
        "baseline_scores": {"corrected": {"f1": 0.25}, "published": {"f1": 0.25}},
        "pscp_inputs": {"trainable_parameters": 5, "memory_gb": 2.0, "memory_kind": "resident_peak_bytes"},
        "events": [],
        "data": {"train": {"rows": 3}},
    }
    return RunRecord.model_validate({**values, **more})


def test_round_trip(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    assert read_record(tmp_path / "run.json") == record()
    plain = json.loads((tmp_path / "run.json").read_text())
    assert "flops" not in plain and "measured_peak_bytes" not in plain["memory"], "what is not known is absent"
    assert plain["scores"]["published"] == {"f1": None}


def test_success_removes_the_note_of_failure(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text("{}")
    write_record(tmp_path, record())
    assert not (tmp_path / "failure.json").exists()


def test_only_the_same_run_is_finished(tmp_path: Path) -> None:
    assert finished_record(tmp_path, "f") is None
    write_record(tmp_path, record())
    assert finished_record(tmp_path, "f") == record()
    with pytest.raises(UserError, match="holds another run: peftdyno train"):
        finished_record(tmp_path, "g")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema_version is 9, this version reads 1"),
        ({"seed": "one"}, "field 'seed'"),
        ({"surprise": 1}, "field 'surprise'"),
        ({"memory": {"peak": 3}}, "field 'memory.peak'"),
    ],
)
def test_broken_records_are_named(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**record().model_dump(mode="json"), **change}))
    with pytest.raises(UserError, match=r"run\.json") as error:
        read_record(path)
    assert message in str(error.value)


def test_truncated_record(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"schema_version": 1,')
    with pytest.raises(UserError, match=r"run\.json is not JSON"):
        read_record(path)
