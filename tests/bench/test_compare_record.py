"""The comparison's JSON file: sections of earlier runs and of other machines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peftdyno.bench.compare import __main__ as command
from peftdyno.bench.compare import step_sections
from peftdyno.bench.compare.equal_work import UnequalWork
from peftdyno.bench.compare.record import Results, section_record
from peftdyno.bench.compare.turns import Row
from peftdyno.engine.errors import UserError


def row() -> Row:
    return Row(workload="w", against="a", unit="steps/s", ours=(8.0,), reference=(2.0,))


def test_earlier_sections_stay_in_the_file(tmp_path):
    path = tmp_path / "compare.json"
    Results(path).put("step-128", section_record([row()], 1.0, "", {}, 2))
    results = Results(path)
    results.put("memory", section_record([], 1.0, "broken", {}, 2))
    kept = Results(path)
    assert len(kept.rows(["step-128", "memory"])) == 1 and kept.errors(["step-128", "memory"]) == {"memory": "broken"}
    assert {"command", "versions", "machine", "git", "finished", "settings"} <= kept.sections["step-128"].keys()
    path.write_text("{}")
    with pytest.raises(UserError, match=str(path)):
        Results(path)


def test_sections_of_another_machine_stay_out_of_the_table(tmp_path):
    results = Results(tmp_path / "compare.json")
    earlier = section_record([row()], 1.0, "broken", {}, 2)
    results.put("step-128", {**earlier, "machine": {**earlier["machine"], "cpu_kernels": "tubes"}})
    results.put("memory", {**section_record([row()], 1.0, "", {}, 2), "finished": "2999-01-01T00:00:00+00:00"})
    assert len(results.rows(["step-128", "memory"])) == 1 and not results.errors(["step-128", "memory"])
    assert list(results.elsewhere(["step-128", "memory"])) == ["step-128"]
    assert "tubes" in results.elsewhere(["step-128"])["step-128"]


class Unequal:
    """Sides that differ."""

    environment: dict = {}  # noqa: RUF012
    plan, classification, model = command.Plan(), SimpleNamespace(train=[]), None

    def check_plain(self, *_):
        raise UnequalWork("loss of step 1 is 9 from fp32's")

    def close(self) -> None:
        """Nothing to end."""


def test_a_method_that_does_other_work_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_sides", lambda *_: Unequal())
    monkeypatch.setattr(step_sections, "METHODS", ["ia3"])
    for name in ("text_batch", "text_batches"):
        monkeypatch.setattr(step_sections, name, lambda *_: [])
    out = tmp_path / "compare.json"
    assert command.main(["--out", str(out), "--only", "methods"]) == 1
    assert "FAILED, unequal work: loss of step 1 is 9" in capsys.readouterr().out
    monkeypatch.setitem(command.SECTIONS, "memory", lambda _: [row()])
    assert command.main(["--out", str(out), "--only", "memory"]) == 1, "the record still has the failed row"
