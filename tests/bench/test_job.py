"""A job: its record, its adapter, and what happens when it is stopped or asked for again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftdyno.bench import job as job_module
from peftdyno.bench.base_model import load_base
from peftdyno.bench.job import Job, Places, run_job
from peftdyno.bench.progress import Progress
from peftdyno.bench.settings import make_settings
from peftdyno.bench.step_summary import summarise
from peftdyno.bench.store import read_record
from peftdyno.engine.border import lay_borders
from peftdyno.engine.panels import held_bytes
from peftdyno.engine.step_tapes import StepTapes
from peftdyno.engine.tape import unavailable
from peftdyno.kernels import cpu, memory


def job_settings(model: Path, data: Path, **more):
    values = {"model": str(model), "data": data, "task": "sst2", "dtype": "fp32", "steps": 6, "batch": 2}
    return make_settings({**values, **more})


@pytest.fixture(scope="module")
def base(tiny_model: Path):
    return load_base(str(tiny_model), "fp32", "cpu")


def finish(base, out: Path, **settings):
    job = Job.prepare(job_settings(base.files.name, settings.pop("data"), **settings))
    return run_job(job, base, Places.under(out, job.settings.seeds), Progress())


def test_record_and_files(base, tiny_data: Path, tmp_path: Path) -> None:
    record = finish(base, tmp_path, data=tiny_data)[0]
    assert read_record(tmp_path / "run.json").model_dump(mode="json") == record.model_dump(mode="json")
    assert (
        record.parameters.trainable
        == record.parameters.stored
        == sum(tensor.numel() for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    )
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert record.loss["first"] == metrics[0]["loss"][0] and record.loss["last"] == metrics[-1]["loss"][0]
    best = min(line["validation_loss"][0] for line in metrics if "validation_loss" in line)
    assert record.loss["best_validation"] == best
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == record.data["test"]["rows"] == 10
    assert record.data["train"]["rows_used"] + record.data["validation"]["rows_used"] == 40
    assert record.data["cut_sequences"] == {"train": 0, "validation": 0, "test": 0}
    assert record.pscp_inputs.score_percent == 100 * record.score()
    assert not (tmp_path / "checkpoints").exists() and not list(tmp_path.rglob(".partial*"))


@pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "threads_used"), [("lora", 1), ("lora", 2), ("lora", 3), ("prompt-tuning", 1), ("full", 1)]
)
def test_predicted_peak_of_a_training_is_the_measured_one(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, dtype: str, method: str, threads_used: int, threads
) -> None:
    """Also on a processor with another matrix library the two must be within one hundredth."""
    threads(threads_used)
    base = load_base(str(tiny_model), dtype, "cpu")
    found = finish(base, tmp_path, data=tiny_data, dtype=dtype, method=method, batch=4, steps=4)[0]
    figures = found.memory
    assert figures.predicted_peak_bytes == pytest.approx(figures.measured_peak_bytes, rel=0.01)
    assert sum(figures.predicted_by_category.values()) == figures.predicted_peak_bytes
    assert 0 < figures.validation_peak_bytes < figures.measured_peak_bytes
    assert 0 < figures.evaluation_peak_bytes < figures.resident_peak_bytes
    assert found.pscp_inputs.memory_kind == "measured_peak_bytes"
    assert found.pscp_inputs.memory_gb == figures.measured_peak_bytes / 1e9


@pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")
def test_panels_are_in_the_predicted_peak(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Only products of bf16 pairs read panels; elsewhere nothing is kept, and nothing predicted."""
    base = load_base(str(tiny_model), "bf16", "cpu")
    plain, kept = (
        finish(base, tmp_path / choice, data=tiny_data, dtype="bf16", batch=4, steps=4, pack_weights=choice)[0]
        for choice in ("off", "on")
    )
    held = held_bytes(base.decoder, backward=True)
    assert kept.memory.predicted_peak_bytes - plain.memory.predicted_peak_bytes == held
    assert kept.memory.predicted_peak_bytes == pytest.approx(kept.memory.measured_peak_bytes, rel=0.01)
    assert sum(kept.memory.predicted_by_category.values()) == kept.memory.predicted_peak_bytes
    assert kept.loss == plain.loss
    if cpu.instruction_set() in ("amx", "avx512_bf16"):
        assert held > 0


@pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_predicted_peak_of_recorded_steps(tiny_model: Path, tiny_data: Path, tmp_path: Path, method: str) -> None:
    """A replayed step takes the memory of a launched one and computes what that does, to the bit."""
    base = load_base(str(tiny_model), "fp32", "cpu")
    records = [
        finish(base, tmp_path / choice, data=tiny_data, method=method, batch=4, steps=60, graphs=choice)[0]
        for choice in ("off", "on")
    ]
    plain, replayed = records
    assert replayed.flops.equal_by_layer and replayed.flops.total == plain.flops.total
    assert replayed.memory.predicted_peak_bytes == plain.memory.predicted_peak_bytes
    assert replayed.memory.measured_peak_bytes == pytest.approx(plain.memory.measured_peak_bytes, rel=0.001)
    assert replayed.loss == plain.loss


@pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
def test_steps_are_recorded_under_a_memory_limit(
    base, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where recordings need no memory."""
    monkeypatch.setattr("peftdyno.engine.recorded_steps.LEAST_TAPED", 8)
    recorded, made = StepTapes._recorded, []
    monkeypatch.setattr(StepTapes, "_recorded", lambda *args: made.append(recorded(*args)) or made[-1])
    found = [
        finish(base, tmp_path / str(i), data=tiny_data, batch=2, steps=steps, memory_limit=limit)[0]
        for i, (steps, limit) in enumerate(((8, "1GiB"), (8, None), (7, None)))
    ]
    assert len(made) >= 4 and found[0].loss == found[1].loss != found[2].loss
    assert found[0].memory.measured_peak_bytes == pytest.approx(found[1].memory.measured_peak_bytes, rel=0.001)


def test_all_steps_flops(base, tiny_data: Path, tmp_path: Path) -> None:
    """With one step it is the sampled one; more steps cost more; inference is that of the unmerged and merged model."""
    one, more = (finish(base, tmp_path / str(n), data=tiny_data, steps=n, evaluate=False)[0] for n in (1, 3))
    matrix = {
        phase: {owner: values["matrix"] for owner, values in owners.items() if values["matrix"]}
        for phase, owners in one.flops.by_class["counted"].items()
    }
    assert one.flops.total.matrix == {phase: owners for phase, owners in matrix.items() if owners}
    assert (one.flops.total.steps, more.flops.total.steps) == (1, 3)
    assert more.flops.total.sum() > 2 * one.flops.total.sum()
    costs = one.inference
    assert costs.merged == costs.base and costs.tflop_above_base("forward", merged=True) == 0
    assert costs.base["decode"] < costs.base["prefill"] < costs.base["forward"] < costs.unmerged["forward"]
    assert one.pscp_inputs.inference_tflop_above_base == costs.tflop_above_base("forward")


def test_model_card_states_what_was_measured(base, tiny_data: Path, tmp_path: Path) -> None:
    record = finish(base, tmp_path, data=tiny_data)[0]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| f1, tuned model | {100 * record.score():.2f}% | measured |" in card
    assert f"| trainable parameters | {record.parameters.trainable:,} | exact |" in card
    assert "| measured peak |" in card and "| resident peak |" in card
    assert "matrix FLOPs of all 6 steps" in card


def test_adapter_is_the_tuned_one(base, tiny_data: Path, tmp_path: Path) -> None:
    finish(base, tmp_path, data=tiny_data, learning_rate=1e-2, evaluate=False)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert changed, "B starts at zero and must have moved"


def test_runs_together_equal_runs_apart(base, tiny_data: Path, tmp_path: Path) -> None:
    together = finish(base, tmp_path / "both", data=tiny_data, seeds=(3, 5))
    for seed, record in zip((3, 5), together, strict=True):
        alone = finish(base, tmp_path / f"alone-{seed}", data=tiny_data, seeds=(seed,))[0]
        assert record.seed == seed and record.runs_together == 2 and alone.runs_together == 1
        assert record.fingerprint == alone.fingerprint
        assert record.scores == alone.scores
        assert record.loss["last"] == pytest.approx(alone.loss["last"], rel=1e-4)
        one, other = (
            load_file(folder / "adapter" / "adapter_model.safetensors")
            for folder in (tmp_path / "both" / f"seed-{seed}", tmp_path / f"alone-{seed}")
        )
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
        lines = (tmp_path / "both" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        assert all(len(json.loads(line)["loss"]) == 1 for line in lines)


def test_asked_again_it_says_what_is_there(shell, tmp_path: Path) -> None:
    line = ("train", "--task", "sst2", *shell.job("--out", tmp_path, "--json"))
    first = shell(*line)
    before = (tmp_path / "run.json").stat().st_mtime_ns
    second = shell(*line)
    assert first.status == second.status == 0 and first.json == second.json
    assert "finished already" in second.err and (tmp_path / "run.json").stat().st_mtime_ns == before


def test_folder_of_another_job_is_refused(shell, tmp_path: Path) -> None:
    shell("train", "--task", "sst2", *shell.job("--out", tmp_path))
    assert "holds another run" in shell.fails("train", "--task", "sst2", *shell.job("--out", tmp_path, "--lr", 1))
    (tmp_path / "run.json").unlink()
    said = shell.fails("train", "--task", "sst2", *shell.job("--out", tmp_path, "--lr", 1))
    assert "unfinished job" in said


def test_what_a_result_does_not_follow_from_is_no_other_job(base, tiny_data: Path) -> None:
    def key(**more):
        return Job.prepare(job_settings(base.files.name, tiny_data, **more)).fingerprint(0, base)

    assert key() == key(threads=1) == key(device="cpu") == key(seeds=(42, 7))
    assert len({key(), key(steps=7), key(seeds=(7,)), key(limit_test=4), key(lora={"rank": 3})}) == 5


def test_changed_data_is_another_job(base, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    folder.mkdir()
    for path in (tiny_data / "sst2").iterdir():
        (folder / path.name).write_text(path.read_text())
    same = Job.prepare(job_settings(base.files.name, tmp_path)).fingerprint(0, base)
    assert same == Job.prepare(job_settings(base.files.name, tiny_data)).fingerprint(0, base)
    path = folder / "validation.jsonl"
    path.write_text(path.read_text().replace("dull", "flat"))
    assert same != Job.prepare(job_settings(base.files.name, tmp_path)).fingerprint(0, base)


def test_long_prompts_are_cut_and_counted(base, tiny_data: Path, tmp_path: Path) -> None:
    record = finish(base, tmp_path, data=tiny_data, max_length=40, evaluate=False, steps=2)[0]
    cut = record.data["cut_sequences"]
    assert cut == {"train": 4, "validation": 4}


def killed(command: list[str], out: Path, path: Path, lines: int) -> bool:
    """Start a command and kill it once a file has so many lines; whether that was before its end."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            os.kill(child.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    return child.wait() != 0


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(shell, tmp_path: Path) -> None:
    line = ["train", "--task", "sst2", "--quiet", *shell.job("--steps", 30, "--seed", 4)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert shell(*line, "--out", whole).status == 0
    command = [sys.executable, "-m", "peftdyno.bench", *map(str, line), "--out", str(broken)]
    assert killed(command, broken, broken / "metrics.jsonl", 3)
    assert killed(command, broken, broken / "metrics.jsonl", 20)
    assert not (broken / "run.json").exists()
    assert shell(*line, "--out", broken).status == 0
    for name in ("metrics.jsonl", "predictions.jsonl", "adapter/adapter_model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    steps = summarise(broken / "steps.jsonl")
    assert steps.tokens >= summarise(whole / "steps.jsonl").tokens


def test_borders_change_no_result(base, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The borders that a training on a GPU would have, on the CPU, whose operators do not read them."""
    settings = {"data": tiny_data, "evaluate": False}
    plain = finish(base, tmp_path / "plain", **settings)[0]
    monkeypatch.setattr(job_module, "fit_borders", lambda weights, bank, device: lay_borders(weights, bank))
    bordered = finish(base, tmp_path / "bordered", **settings)[0]
    assert base.decoder.weights.layers[0].qkv.stride(0) > base.decoder.weights.layers[0].qkv.shape[1]
    assert bordered.loss == plain.loss
    tensors = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("plain", "bordered")]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
