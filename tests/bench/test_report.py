"""Reports: the same tasks for every method, missing runs named, every figure traceable."""

from __future__ import annotations

import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from peftdyno.bench.pscp import pscp
from peftdyno.bench.report import compare, write_pages
from peftdyno.bench.report.collection import collect
from peftdyno.bench.report.plots import Bar, Point, bars, points
from peftdyno.bench.report.tables import pscp_three_ways, resources
from peftdyno.bench.store import RunRecord, write_record
from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError

SCORES = {
    ("lora", "sst2"): (0.9, 0.8),
    ("lora", "rte"): (0.6, 0.7),
    ("ia3", "sst2"): (0.7, 0.7),
    ("ia3", "rte"): (0.5, 0.55),
}
TRAINABLE = {"lora": 1_000_000, "ia3": 10_000}


def made_up(method: str, task: str, seed: int, score: float, **more) -> RunRecord:
    """A record whose figures are given, not measured."""
    inputs = {"score_percent": 100 * score, "trainable_parameters": TRAINABLE[method], "memory_gb": 1.0 + seed}
    inputs |= {"memory_kind": "measured_peak_bytes", "inference_tflop_above_base": 0.02 if method == "lora" else 0.0}
    values = {
        "fingerprint": f"{method}{task}{seed}",
        "finished": "2025-01-01T00:00:00+00:00",
        "command": f"peftdyno train --method {method} <{task}>",
        "versions": {"torch": "2.13"},
        "machine": {"processor": "p", "threads": 2},
        "git": {"commit": "abcdef0123456789", "changed": False},
        "model": {"name": "tiny"},
        "method": {"name": method, "settings": {}},
        "task": {"name": task, "metric": "f1"},
        "seed": seed,
        "settings": {"batch": 4},
        "steps": 10,
        "parameters": {"trainable": TRAINABLE[method], "stored": TRAINABLE[method], "total": 10**8},
        "memory": {"measured_peak_bytes": (1 + seed) * 10**9},
        "time": {"training": 8.0, "evaluation": 2.0, "step_median": 0.25},
        "loss": {},
        "scores": {"corrected": {"f1": score}, "published": {"f1": score - 0.1}},
        "baseline_scores": {"corrected": {"f1": 0.25}, "published": {"f1": 0.25}},
        "pscp_inputs": inputs,
        "events": [],
        "data": {},
    }
    return RunRecord.model_validate({**values, **more})


def write(folder: Path, scores=SCORES, *, leave_out=(), **more) -> Path:
    """A sweep with two seeds of each cell, but for what is left out."""
    for (method, task), values in scores.items():
        for seed, score in enumerate(values):
            if (method, task, seed) not in leave_out:
                write_record(
                    folder / "runs" / method / task / f"seed-{seed}", made_up(method, task, seed, score, **more)
                )
    grid = {"methods": ["lora", "ia3"], "tasks": ["sst2", "rte"], "seeds": [0, 1]}
    write_json(folder / "sweep.json", {"settings": {}, "grid": grid})
    return folder


def rows_of(folder: Path, **chosen):
    comparison = compare(collect(folder, **chosen))
    return comparison, {row.method: row for row in comparison.rows}


def test_means_and_pscp(tmp_path: Path) -> None:
    comparison, rows = rows_of(write(tmp_path))
    lora = rows["lora"]
    assert lora.score == pytest.approx(75.0) and rows["ia3"].score == pytest.approx(61.25)
    assert lora.deviation == pytest.approx(statistics.stdev([75.0, 75.0]))
    assert lora.published_score == pytest.approx(65.0)
    assert lora.pscp == pytest.approx(pscp(75.0, 1_000_000, 0.02, 1.5))
    assert lora.low < lora.pscp < lora.high
    assert (lora.rank, rows["ia3"].rank) == (1, 2)
    assert comparison.tasks == ("sst2", "rte") and comparison.untuned_mean == pytest.approx(25.0)
    assert lora.run_seconds == pytest.approx(10.0)


def test_missing_runs_are_named_and_means_stay_comparable(tmp_path: Path) -> None:
    write(tmp_path, leave_out={("ia3", "rte", 1)})
    write_json(tmp_path / "runs/ia3/rte/seed-1/failure.json", {"error": "out of memory"})
    comparison, rows = rows_of(tmp_path)
    assert comparison.tasks == ("sst2",)
    assert rows["lora"].score == pytest.approx(85.0), "lora's rte must not enter its mean either"
    assert "missing: ia3 rte seed 1 (out of memory)" in comparison.notes
    assert any("left out of every mean" in note and "rte" in note for note in comparison.notes)
    assert comparison.cells["ia3", "rte"].scores == (50.0,)


def test_a_method_without_any_run_is_named(tmp_path: Path) -> None:
    write(tmp_path, {key: value for key, value in SCORES.items() if key[0] == "lora"})
    comparison, rows = rows_of(tmp_path)
    assert set(rows) == {"lora"} and comparison.tasks == ("sst2", "rte")
    assert "no finished run: ia3" in comparison.notes and len(comparison.collection.missing) == 4


def test_inputs_that_were_not_obtained_are_left_out_for_all(tmp_path: Path) -> None:
    write(tmp_path, leave_out={("ia3", "rte", 1)})
    record = made_up("ia3", "rte", 1, 0.55)
    bare = record.pscp_inputs.model_copy(update={"inference_tflop_above_base": None})
    write_record(tmp_path / "runs/ia3/rte/seed-1", record.model_copy(update={"pscp_inputs": bare}))
    comparison, rows = rows_of(tmp_path)
    assert comparison.without == ("tflop",)
    assert rows["lora"].pscp == pytest.approx(pscp(75.0, 1_000_000, 0.0, 1.5))
    assert rows["ia3"].inference_tflop is None
    assert any("not counted" in note for note in comparison.notes)


def test_one_run_has_no_interval(tmp_path: Path) -> None:
    write_record(tmp_path / "a", made_up("lora", "sst2", 3, 0.9))
    comparison, rows = rows_of(tmp_path)
    assert rows["lora"].low is None and rows["lora"].deviation is None and rows["lora"].pscp is not None
    assert any("nothing to resample" in note for note in comparison.notes)


def test_negative_scores(tmp_path: Path) -> None:
    write(tmp_path, {("lora", "sst2"): (-0.4, 0.1), ("ia3", "sst2"): (-0.1, 0.9)})
    _, rows = rows_of(tmp_path, tasks=("sst2",))
    assert rows["lora"].pscp is None and rows["ia3"].pscp is not None and rows["ia3"].low is None


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        collect(tmp_path / "none")
    with pytest.raises(UserError, match="has no finished run"):
        collect(tmp_path)
    write(tmp_path / "s")
    with pytest.raises(UserError, match=r"unknown method of .* 'lorra'; did you mean lora"):
        collect(tmp_path / "s", methods=("lorra",))
    write_record(tmp_path / "s/again", made_up("lora", "sst2", 0, 0.9))
    with pytest.raises(UserError, match="are both lora on sst2 with seed 0"):
        collect(tmp_path / "s")
    write_record(tmp_path / "s/again", made_up("lora", "sst2", 0, 0.9, model={"name": "other"}))
    with pytest.raises(UserError, match=r"runs of 2 models; choose with --model: other, tiny"):
        collect(tmp_path / "s")
    assert len(collect(tmp_path / "s", model="tiny").runs) == 8


def test_runs_that_were_scored_differently_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    other = {"corrected": {"f1": 0.5}, "published": {"f1": 0.5}}
    write_record(tmp_path / "runs/ia3/rte/seed-1", made_up("ia3", "rte", 1, 0.55, baseline_scores=other))
    with pytest.raises(UserError, match=r"untuned model scored 50\.00 on rte, elsewhere 25\.00"):
        rows_of(tmp_path)


class Page(HTMLParser):
    """Collects the text and every address of a page, and checks that its elements close."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def test_pages(tmp_path: Path) -> None:
    comparison, rows = rows_of(write(tmp_path))
    paths = write_pages(comparison, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    page = Page((tmp_path / "report.html").read_text())
    text = " ".join(page.words)
    assert not page.addresses, "the page must not need another file"
    assert f"{rows['lora'].pscp:.2f}" in text and "<sst2>" in text, "names are escaped, not lost"
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    markdown = (tmp_path / "report.md").read_text()
    assert f"| lora | 75.00 ± 0.00 | {rows['lora'].pscp:.2f} |" in markdown
    plain = json.loads((tmp_path / "report.json").read_text())
    assert plain["rows"][0]["pscp"] == rows["lora"].pscp
    for run in plain["runs"]:
        assert (tmp_path / run["folder"] / "run.json").exists()
    assert len(plain["runs"]) == 8


def inference(extra: int, *, merged: bool) -> dict:
    base = {"forward": 10**9, "prefill": 8 * 10**8, "decode": 10**6}
    unmerged = {phase: flops + extra for phase, flops in base.items()}
    return {"tokens": 512, "base": base, "unmerged": unmerged, "merged": base if merged else None}


def test_pscp_three_ways(tmp_path: Path) -> None:
    """Each column from its own source; a method that PEFT-Bench lacks, or that cannot be merged, says so."""
    for method, seed, merged in (("lora", 0, True), ("svft", 0, False)):
        record = made_up("lora", "sst2", seed, 0.8, inference=inference(2 * 10**10, merged=merged))
        record = record.model_copy(update={"method": {"name": method, "settings": {}}})
        write_record(tmp_path / method, record)
    comparison = compare(collect(tmp_path))
    lora, svft = sorted(comparison.ways, key=lambda way: way.method)
    printed = [round(value, 2) for value in (lora.published, lora.corrected, lora.corrected_merged)]
    assert printed == [60.08, 58.37, 58.46]
    assert lora.measured == pytest.approx(pscp(80.0, 1_000_000, 0.02, 1.0))
    assert lora.measured_merged == pytest.approx(pscp(80.0, 1_000_000, 0.0, 1.0))
    assert (lora.prefill_tflop, lora.prefill_tflop_merged) == (0.02, 0.0)
    assert (svft.published, svft.corrected, svft.measured_merged, svft.token_tflop) == (None, None, None, 0.02)
    table = pscp_three_ways(comparison)
    assert table.rows[0][-2:] == ("20 / 0", "20,000 / 0")
    assert table.rows[1][1:4] == ("not in PEFT-Bench",) * 3 and table.rows[1][5] == "cannot be"
    assert "Meta-Llama-3-8B-Instruct over the 27 data sets" in table.caption and "tiny over sst2" in table.caption
    write_pages(comparison, tmp_path)
    for name in ("report.md", "report.html"):
        assert table.caption.split("'")[0] in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "report.json").read_text())["three_ways"][0]["corrected"] == lora.corrected


def test_costs_beside_the_score(tmp_path: Path) -> None:
    figures = {"predicted_peak_bytes": 3 * 10**9, "measured_peak_bytes": 2 * 10**9, "validation_peak_bytes": 4 * 10**9}
    joules = {"training": 30.0, "forward": 10.0, "evaluation": 6.0, "baseline": 9.0}
    counter = {"source": "rapl", "covers": "all", "resolution_seconds": 0.001, "joules": joules}
    write(tmp_path, memory=figures, energy=counter, runs_together=2)
    comparison, rows = rows_of(tmp_path)
    costs = rows["lora"].costs
    assert (costs.predicted_gb, costs.measured_gb, costs.memory_ratio) == (3.0, 2.0, 1.5)
    assert costs.joules == 18.0, "training and evaluation, shared by two runs"
    assert costs.training_tflop is None and costs.resident_gb is None
    assert any(note.endswith("is not in PSCP: ia3, lora") for note in comparison.notes)
    assert "energy J" in resources(comparison).header


def test_plots_stay_inside_and_keep_order() -> None:
    drawn = bars([Bar("a", 50.0, 40.0, 60.0), Bar("<b>", 25.0)], "PSCP")
    assert "&lt;b&gt;" in drawn and 'class="whisker"' in drawn
    widths = [float(part.split('"')[0]) for part in drawn.split('class="bar"')[1].split('width="')[1:2]]
    assert widths[0] < 510
    spread = points([Point("a", 1e4, 10.0), Point("b", 1e6, 20.0)], "x", "y", logarithmic=True)
    xs = [float(part.split('"')[0]) for part in spread.split('cx="')[1:]]
    ys = [float(part.split('"')[0]) for part in spread.split('cy="')[1:]]
    assert 0 < xs[0] < xs[1] < 510 and 0 < ys[1] < ys[0] < 320
    assert points([Point("a", 5.0, 5.0)], "x", "y")
    close = points([Point("first-name", 1.0, 5.0), Point("second", 1.1, 5.0), Point("far", 9.0, 1.0)], "x", "y")
    heights = [float(part.rsplit(' y="', 1)[1].split('"')[0]) for part in close.split(">first-name<")[0:1]]
    heights += [float(part.rsplit(' y="', 1)[1].split('"')[0]) for part in close.split(">second<")[0:1]]
    assert abs(heights[0] - heights[1]) >= 13, "names of close points stand below each other"
