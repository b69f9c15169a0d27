"""The microbenchmarks run, and their cases are the operators' own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_operators_are_timed_with_their_rates(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "times.json"
    command = [sys.executable, "-P", "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider", "-k",
               "bank_scale_ and not compile", f"--benchmark-json={file}"]  # fmt: skip
    # a worker of a divided test run would switch the benchmarks off
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = file.read_text()
    assert '"gbytes_per_second"' in text and "bank_scale_" in text
