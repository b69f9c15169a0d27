"""Counters of a card: a made-up table as ncu prints it, and what is said where none can be read."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from peftdyno.bench.profiling import hardware, one_step
from peftdyno.bench.profiling.bench import Bench
from peftdyno.bench.profiling.hardware import METRICS, compare, measure, parse
from peftdyno.bench.profiling.spec import Spec
from peftdyno.engine.errors import UserError

SPEC = Spec(model="smollm2-135m", method="lora", sets=(), dtype="bf16", device="cuda", batch=1, length=8)
COLUMNS = ("ID", "Process ID", "Kernel Name", *METRICS)
UNITS = ("", "", "", "", "", "inst", "byte", "byte")
"""The row below the header; the figures of a launch are in the order of METRICS."""


def table(*launches: tuple[object, ...]) -> str:
    """News, a header, units, and launches of (kernel, bf16, tf32, multiply-adds, read, written)."""
    rows = [COLUMNS, UNITS, *((i, 77, *launch) for i, launch in enumerate(launches))]
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    return "\n".join(["==PROF== Connected to process 77", "==PROF== Profiling 3 kernels", *lines]) + "\n"


SAMPLE = table(
    ("void gemm<bf16, 128>(int)", "2,147,483,648", 0, 10, "1,000", "24"),
    ("norm", 0, 0, 512, 300, 200),
    ("void gemm<bf16, 128>(int)", 1000, 0, 0, 1, 1),
)


def test_table() -> None:
    first, norm, last = parse(SAMPLE)
    assert (first.name, first.tensor_flops, first.fma_flops, first.dram_bytes) == (
        "void gemm<bf16, 128>(int)", 2 * 1024**3, 20, 1024,
    )  # fmt: skip
    assert (norm.fma_flops, norm.dram_bytes, last.tensor_flops) == (1024, 500, 1000)


def test_sums_beside_the_count() -> None:
    found = compare(parse(SAMPLE), 2 * 1024**3, 900)
    assert found["tensor_flops"] == 2 * 1024**3 + 1000 and found["dram_bytes"] == 1526
    assert found["counted_over_hardware"] == pytest.approx(2 * 1024**3 / (2 * 1024**3 + 1000))
    assert [(k["kernel"], k["launches"]) for k in found["kernels"]] == [("void gemm<bf16, 128>(int)", 2), ("norm", 1)]
    plain = compare(parse(table(("sgemm", 0, 0, 500, 1, 1))), 1000, 2)
    assert plain["counted_over_hardware"] == 1.0, "without tensor cores the multiply-adds are the products"
    assert compare([], 0, 0)["counted_over_hardware"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==PROF== Connected\n", "ncu printed no table"),
        (SAMPLE.replace("dram__bytes_read.sum", "other"), "counters lack dram__bytes_read.sum"),
        (SAMPLE.replace('"512"', '"n/a"'), "of norm is 'n/a', not a number"),
    ],
)
def test_no_figure_is_made_up(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_what_the_tool_says() -> None:
    def answer(status: int, out: str, err: str = ""):
        return lambda command: subprocess.CompletedProcess(command, status, out, err)

    assert len(measure("ncu", SPEC, "forward", answer(0, SAMPLE))) == 3
    with pytest.raises(UserError, match="keeps the card's counters to the administrator"):
        measure("ncu", SPEC, "forward", answer(1, "==ERROR== ERR_NVGPUCTRPERM - no permission"))
    with pytest.raises(UserError, match="ended with 9 in backward and said: out of luck"):
        measure("ncu", SPEC, "backward", answer(9, "", "out of luck\n\n"))


def test_the_command_asks_for_one_phase() -> None:
    asked = []

    def run(command):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 0, SAMPLE, "")

    measure("ncu", SPEC, "optimizer", run)
    assert asked[asked.index("--nvtx-include") + 1] == "optimizer"
    assert asked[asked.index("--metrics") + 1].split(",") == list(METRICS)


def test_without_a_card_or_the_tool(shell, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("profile", "--model", "smollm2-135m", "--device", "cpu", "--hardware")
    assert "there is none here" in shell.fails(*words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="`ncu` is not on PATH"):
        hardware.hardware_profile(SPEC)


def test_the_step_runs_on_the_card_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(Bench, "of", lambda job, *sizes: done.append(job.device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one_step.main(json.dumps(asdict(replace(SPEC, card=1))))
    assert done == [1, "cuda"]
