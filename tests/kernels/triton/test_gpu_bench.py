"""The GPU machine's command at tiny sizes, without the packages that machine lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftdyno.bench.gpu import losses, memory
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import FULL, TINY
from peftdyno.bench.gpu.step import lean, pack_of, settings
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.accounting.scope import Scope

ROOT = Path(__file__).parents[3]
LACKING = """
import sys
for name in ("pydantic", "datasets", "plotly", "gguf", "typer"):
    sys.modules[name] = None
from peftdyno.bench.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_sections_run_resume_and_report(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", LACKING, "--tiny", "--only", "decode", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "decode.jsonl").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and (tmp_path / "decode.jsonl").read_text() == rows, "finished rows are kept"
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in report["decode"]["rows"]}
    assert report["provenance"]["tiny"] and len(rows) == 5
    assert rows["replayed steps give the same tokens"]["ok"]
    figures = {goal["goal"]: goal["figure"] for goal in report["goals"]}
    assert figures["classification prompts, shared prefix"] > 0 and figures["head and cross-entropy"] is None
    assert "not measured" in again.stdout and "not met" not in again.stdout, "tiny sizes decide nothing"


def test_a_section_out_of_time_leaves_its_rows_for_later(tmp_path: Path) -> None:
    section = Section.open("micro", tmp_path, 0.0, fresh=False)
    assert not section.wants("rms_norm") and section.left == ["rms_norm"]
    section.add("glu", ms=1.0)
    assert not Section.open("micro", tmp_path, 60.0, fresh=False).wants("glu")
    assert Section.open("micro", tmp_path, 60.0, fresh=True).wants("glu")


def test_losses_follow_those_of_transformers_and_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    section = Section.open("step", tmp_path, 600.0, fresh=True)
    losses.run(section, TINY, torch.device("cpu"))
    (row,) = section.rows.values()
    assert row["ok"] and row["first"] != row["last"]


def test_memory_of_the_bordered_step_is_predicted_without_a_gpu() -> None:
    bordered, plain = settings(TINY)[:2]
    pack = pack_of(TINY, 1, TINY.config().vocab_size)
    found = [memory.prediction(TINY, setting, pack) for setting in (bordered, plain)]
    peaks = [prediction.peak_bytes for prediction in found]
    assert [prediction.recomputed_flops for prediction in found] == [0, 0]
    weights = sum(t.numel() * 2 for t in Job(config=TINY.config()).model(Scope())[0].weights.tensors())
    assert peaks[0] > peaks[1] > weights


def test_an_8b_step_fits_44_gb_without_a_product_computed_again() -> None:
    pack = pack_of(FULL, 1, FULL.config().vocab_size)
    predicted = memory.prediction(FULL, lean(FULL), pack)
    assert predicted.recomputed_flops == 0
    assert 41.4e9 < predicted.peak_bytes < 44e9  # the floor: weights and what no product can do without


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--tiny" in result.stderr
