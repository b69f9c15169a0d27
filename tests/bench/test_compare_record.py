"""The comparison's JSON file: sections of earlier runs and of other machines."""

from __future__ import annotations

import pytest

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
