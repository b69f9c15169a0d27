"""`cost`, `ceiling` and `profile`: the published figures, what merging saves, and files that can be opened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from peftdyno.bench.cli import run
from peftdyno.bench.cost import Limits, cost_report
from peftdyno.bench.profiling import ceiling
from peftdyno.bench.profiling.profile import profile
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.config import DecoderConfig
from peftdyno.kernels import memory, triton

TINY = DecoderConfig(
    family="llama", vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def cost_json(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert run(["cost", *arguments, "--json"], "peftdyno") == 0
    return json.loads(capsys.readouterr().out)


def test_llama_by_its_name_alone(capsys: pytest.CaptureFixture) -> None:
    found = cost_json(capsys, "--model", "meta-llama/Meta-Llama-3-8B-Instruct", "--batch", "1", "--seq", "512")
    base, lora = found["inference"]["base"]["forward"], found["inference"]["unmerged"]["forward"]
    assert base["matrix_full"] == 7_822_209_187_840
    assert lora["matrix"] - base["matrix"] == 15_032_385_536
    assert found["inference"]["merged"]["forward"]["above_base"] == 0
    adapter = 14_680_064
    counts = {"base": 8_030_261_248, "trainable": adapter, "stored": adapter, "inference": adapter}
    assert found["parameters"] == counts
    memory = found["training"]["memory"]
    assert memory["predicted_peak_bytes"] == sum(memory["by_category"].values()) > 2 * 8_030_261_248


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_report(name: str) -> None:
    """Merging never costs more than the adapter beside the model, save where the base has no bias to merge into."""
    report = cost_report(Job(config=TINY, methods=(METHODS[name](),)), 2, 8)
    unmerged, merged = report["inference"]["unmerged"], report["inference"].get("merged")
    assert (merged is None) == ("not_mergeable" in report["inference"])
    if merged is not None and name != "bitfit":
        assert all(merged[phase]["total"] <= unmerged[phase]["total"] for phase in unmerged)


def test_activations_and_a_memory_limit() -> None:
    job = Job(config=TINY, methods=(METHODS["lora"](rank=2),) * 2)
    keep, recompute = (
        cost_report(replace(job, activations=policy), 4, 96)["training"] for policy in ("keep", "recompute")
    )
    peaks = [found["memory"]["predicted_peak_bytes"] for found in (keep, recompute)]
    assert peaks[1] < peaks[0]
    assert 0 < recompute["flops"]["recompute"]["base"]["matrix"] < keep["flops"]["forward"]["base"]["matrix"]
    assert "recompute" not in keep["flops"]
    for runs in (2, 1):
        limited = cost_report(replace(job, methods=job.methods[:runs]), 4, 96, Limits(int(0.9 * peaks[1])))
        found = limited["training"]["within_limit"]
        assert found["predicted_peak_bytes"] <= 0.9 * peaks[1] and found["runs_together"] <= runs
        assert found["says"].startswith("memory limit ") and found["activations"] in found["says"]
    nothing = cost_report(job, 4, 48, Limits(1000))["training"]["within_limit"]
    assert "give --memory-limit" in nothing["says"]


def test_memory_on_a_gpu(capsys: pytest.CaptureFixture, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the allocator and cuBLAS's workspace come on top; without Triton its scratch is not known."""
    shape = ("--model", str(tiny_model), "--method", "ia3", "--seq", "16", "--batch", "1")
    on_cpu = cost_json(capsys, *shape)["training"]["memory"]
    on_gpu = cost_json(capsys, *shape, "--device", "cuda")["training"]["memory"]
    assert "predicted_reserved_bytes" not in on_cpu
    peak, reserved = on_gpu["predicted_peak_bytes"], on_gpu["predicted_reserved_bytes"]
    assert 32 << 20 < peak <= reserved < peak + 3 * (2 << 20)
    if triton.installed():
        assert "not_exact" not in on_gpu
    monkeypatch.setattr(triton, "installed", lambda: False)
    assert "Triton" in cost_json(capsys, *shape, "--device", "cuda")["training"]["memory"]["not_exact"]


def test_a_memory_limit_on_the_command_line(capsys: pytest.CaptureFixture, tiny_model: Path) -> None:
    shape = ("--model", str(tiny_model), "--method", "ia3", "--seq", "16", "--batch", "1")
    assert cost_json(capsys, *shape, "--memory-limit", "8GiB")["training"]["within_limit"]["activations"] == "keep"
    for options, said in (
        (("--memory-limit", "3 parsecs"), "no size of memory"),
        (("--activations", "most"), "'keep'"),
    ):
        assert run(["cost", *shape, *options], "peftdyno") == 2
        assert said in capsys.readouterr().err


def test_unknown_names_are_one_line(capsys: pytest.CaptureFixture) -> None:
    assert run(["cost", "--model", "llama-3-8b", "--method", "lorra"], "peftdyno") == 2
    assert "lora" in capsys.readouterr().err
    assert run(["cost", "--model", "llama-3-8b", "--set", "lora.rnk=2"], "peftdyno") == 2
    assert "rank" in capsys.readouterr().err


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFTDYNO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ceiling.SIZES, "cpu", 64)
    monkeypatch.setitem(ceiling.COPY_BYTES, "cpu", 1 << 16)


@pytest.mark.usefixtures("quick_ceilings")
def test_ceilings_are_measured_once() -> None:
    first = ceiling.ceilings(torch.device("cpu"))
    assert first["copy_bytes"] > 0 and set(first["matmul_flops"]) == {"bf16", "fp32"}
    assert ceiling.ceilings(torch.device("cpu")) == first
    assert ceiling.ceilings(torch.device("cpu"), again=True) != first


@pytest.mark.usefixtures("quick_ceilings")
def test_a_profile_and_its_files(tmp_path: Path) -> None:
    job = Job(config=TINY, methods=(METHODS["lora"](rank=2),), dtype=torch.float32)
    found = profile(job, 2, 12, 2, tmp_path / "out")
    assert found["flops"]["counted"] == found["flops"]["predicted"]
    assert found["memory"]["followed_peak_bytes"] == found["memory"]["predicted_peak_bytes"]
    assert found["steps"]["timed"] == 2
    assert {row["operator"] for row in found["operators"]} >= {"lora_linear", "attention_backward", "adamw_"}
    assert all(row["seconds"] > 0 for row in found["operators"])
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    board = tmp_path / "out" / "tensorboard" / "step.pt.trace.json"
    assert board.read_bytes() == (tmp_path / "out" / "trace.json").read_bytes()
    accounting = found["accounting"]
    assert accounting["allocations"] > 0 or not memory.available()
    own = accounting["bookkeeping_seconds"] + accounting["recording_seconds"]
    assert 0 < own < 0.01 and accounting["share"] == pytest.approx(own / accounting["step_seconds"])
    page = (tmp_path / "out" / "memory.html").read_text()
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
