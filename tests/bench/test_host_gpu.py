"""Commands on a CUDA device that is made of the host's memory: what only tensors of a second device can show.

There a tensor of the CPU beside one of the GPU, a kernel's table that was never uploaded, memory that is read before it
is written, a copy that waits, and whatever CUDA graphs refuse are errors, as on a GPU. Kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ..host_gpu import build

TESTS = Path(__file__).parent.parent
CUBLAS = 32 << 20
"""Bytes that are predicted for cuBLAS, which this device has no use for."""
TABLES = 64 << 10
"""Bytes that kernels' tables may take, which a prediction leaves out."""
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a CUDA device of its own")


@dataclass
class Ran:
    """What a command printed, and what was seen of the device."""

    out: str
    steps: list[dict[str, int]]


Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs a command line on the device."""
    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    library = build.built(TESTS.parent / "build" / "host_gpu")
    report = tmp_path_factory.mktemp("host_gpu") / "report.json"

    def run(*words: object) -> Ran:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-P", "-m", "host_gpu.run", library, report, *words, "--device", "cuda"]
        ran = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return Ran(out=ran.stdout, **json.loads(report.read_text()))

    return run


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _losses(folder: Path) -> torch.Tensor:
    """[steps], of a run."""
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


ONE, TWO = ["."], ["seed-1", "seed-2"]
TRAININGS = [
    ("lora, recorded", TWO, ["--method", "lora", "--seed", "1,2", "--graphs", "on"]),
    ("prefix-tuning", ONE, ["--method", "prefix-tuning", "--graphs", "off", "--activations", "cheap"]),
    ("ia3 on 4 bits", ONE, ["--method", "ia3", "--graphs", "off", "--quant", "nf4"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "runs", "options"), TRAININGS, ids=[name for name, _, _ in TRAININGS])
def test_a_training_on_a_gpu_is_that_on_a_cpu(
    name: str, runs: list[str], options: list[str], on_gpu: Command, shell, tiny_model: Path, tiny_data: Path, tmp_path
) -> None:
    words = ["train", "--model", tiny_model, "--task", "sst2", "--data", tiny_data, "--steps", "3", "--batch", "1"]
    words += ["--dtype", "fp32", "--limit-test", "2", "--limit-validation", "2", *options]
    there, here = tmp_path / "gpu", tmp_path / "cpu"
    ran = on_gpu(*words, "--out", there)
    assert shell(*words, "--out", here, "--graphs", "off").status == 0
    for run in [*runs, "baseline"]:
        assert (there / run / "predictions.jsonl").read_text() == (here / run / "predictions.jsonl").read_text()
    for run in runs:
        record = _read(there / run / "run.json")
        assert record["settings"]["device"] == "cuda" and record["flops"]["equal_by_layer"]
        if "off" in options:
            predicted, measured = (record["memory"][f"{which}_peak_bytes"] for which in ("predicted", "measured"))
            assert 0 <= measured + CUBLAS - predicted <= TABLES
        assert torch.allclose(_losses(there / run), _losses(here / run), rtol=1e-4)
    third = ran.steps[2]  # the first two recorded steps are checked against launched ones
    assert third["waits"] <= 2, "a step waits for its losses and for its norms"
    assert third["replays"] == ("on" in options)


@pytest.mark.slow
def test_a_profile_on_a_gpu_is_of_the_step_that_is_predicted(on_gpu: Command, tiny_model: Path, tmp_path: Path) -> None:
    words = [
        "profile",
        "--model",
        tiny_model,
        "--method",
        "lora",
        "--dtype",
        "fp32",
        "--batch",
        "1",
        "--seq",
        "8",
        "--steps",
        "1",
    ]
    out = on_gpu(*words, "--out", tmp_path).out
    (line,) = [line for line in out.splitlines() if line.startswith("peak memory: predicted")]
    predicted, followed = (int(word.replace(",", "")) for word in line.split() if word[0].isdigit())
    assert predicted == followed
