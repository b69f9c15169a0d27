"""The GPU machine's command at tiny sizes, without the packages that machine lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftdyno.bench.gpu.results import Section

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
    assert report["provenance"]["tiny"] and len(report["decode"]["rows"]) == 3


def test_a_section_out_of_time_leaves_its_rows_for_later(tmp_path: Path) -> None:
    section = Section.open("micro", tmp_path, 0.0, fresh=False)
    assert not section.wants("rms_norm") and section.left == ["rms_norm"]
    section.add("glu", ms=1.0)
    assert not Section.open("micro", tmp_path, 60.0, fresh=False).wants("glu")
    assert Section.open("micro", tmp_path, 60.0, fresh=True).wants("glu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--out", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--tiny" in result.stderr
