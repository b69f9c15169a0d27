"""Every goal of the GPU machine's table has a row that some section makes, and tiny sizes make them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from peftdyno.bench.gpu import (
    __main__ as command,
)
from peftdyno.bench.gpu import (
    checks,
    decode,
    goals,
    grid,
    head_loss,
    hf_step,
    liger,
    memory,
    micro,
    peak,
    same_bits,
    step,
)
from peftdyno.bench.gpu.goal import at_most, lines, read
from peftdyno.bench.gpu.results import DeviceLost, Section, lost
from peftdyno.bench.gpu.sizes import FULL, TINY, Sizes
from peftdyno.kernels import dispatch
from peftdyno.kernels.library import PRIMITIVES

LEAST = replace(TINY, length=8, losses=(1, 8, 2), pointwise_tokens=(3,), grid=replace(TINY.grid, tasks=((2, 4, 6),)))
"""Sizes that run in seconds."""
CPU = torch.device("cpu")
MODULES: dict[str, ModuleType] = {
    "kernels": checks, "micro": micro, "grid": grid, "step": step, "decode": decode, "memory": memory,
}  # fmt: skip


class Anything(dict[str, Any]):
    """A row that has every value."""

    def __missing__(self, key: str) -> float:
        return 1.0

    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: str, default: Any = None) -> float:
        return self[key]


class Listing(Section):
    """A section that measures nothing and keeps the names it is asked for."""

    def wants(self, name: str, takes: float = 0.0) -> bool:
        self.left.append(name)
        return False


class Asked(dict[str, Any]):
    """Rows that remember which of them were read."""

    def __init__(self, names: list[str]) -> None:
        super().__init__({name: Anything() for name in names})
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


class Chosen(Section):
    """A section that measures the rows named, where they are not there yet."""

    names: set[str]

    def wants(self, name: str, takes: float = 0.0) -> bool:
        return name in self.names and name not in self.rows


def listed(sizes: Sizes, section: str, folder: Path, *, tiny: bool) -> list[str]:
    """Names of the rows that a section can make."""
    listing = Listing(section, folder / f"{section}.jsonl", 0.0)
    listing.rows["ceilings"] = {"bytes_per_second": 1.0, "flops_per_second": 1.0}
    MODULES[section].run(listing, sizes, CPU, tiny=tiny)
    return listing.left


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Liger-Kernel, PyTorch: its rows are made too."""
    monkeypatch.setattr(liger, "installed", lambda: True)
    for name in liger.FORMS:
        reference = PRIMITIVES[name].implementations["reference"]
        monkeypatch.setitem(liger.FORMS, name, lambda *a, call=reference: lambda: call(*a))
    unpatched = SimpleNamespace(apply_liger_kernel_to_llama=lambda: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=unpatched))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", unpatched)


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    dispatch.use("triton")
    yield
    dispatch.use("auto")


def test_the_command_runs_every_section() -> None:
    assert set(command.SECTIONS) - {command.ON_REQUEST} == set(MODULES)
    assert command.SECTIONS[0] == command.ON_REQUEST, "what it finds holds for all others"
    assert command.SECTIONS.index("grid") < command.SECTIONS.index("step"), "the last step row patches transformers"


def test_results_say_where_they_come_from_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    row = command.provenance(CPU, tiny=True)
    assert row["commit"] is None and row["torch"] == torch.__version__


def test_some_section_makes_the_row_of_every_goal(tmp_path: Path, stand_in: None) -> None:
    rows = {s: {n: Anything() for n in listed(FULL, s, tmp_path, tiny=False)} for s in MODULES}
    report = goals.report(rows, FULL)
    assert [goal["goal"] for goal in report if goal["figure"] is None] == []
    assert len({goal["goal"] for goal in report}) == len(report)
    assert all(goal["figure"] is None and goal["met"] is None for goal in goals.report({}, FULL))


def test_a_goal_without_a_row_is_found(tmp_path: Path, stand_in: None) -> None:
    """Whatever single section is missing, some goal has no figure."""
    every = {s: {n: Anything() for n in listed(FULL, s, tmp_path, tiny=False)} for s in MODULES}
    for section in MODULES:
        rest = {s: rows for s, rows in every.items() if s != section}
        assert any(goal["figure"] is None for goal in goals.report(rest, FULL)), section


def test_rows_that_goals_rest_on_are_measured_first(tmp_path: Path, stand_in: None) -> None:
    names = listed(FULL, "micro", tmp_path, tiny=False)
    asked = Asked(names)
    goals.report({"micro": asked}, FULL)
    assert set(names[: len(asked.read)]) == asked.read
    assert all(name.endswith(" by compile") for name in names[-8:]), "what takes longest comes last"
    assert len(set(names)) == len(names)


def test_a_goal_waits_for_what_everybody_has(stand_in: None) -> None:
    """Liger's time alone says nothing of torch.compile's; one that failed leaves the goal to the other."""
    names = [*micro.POINTWISE, *(micro.at_tokens(name, n) for name in micro.POINTWISE for n in FULL.pointwise_tokens)]
    rows: dict[str, dict[str, Any]] = {name: {"ms": 3.0} for name in names}
    rows |= {micro.by(name, "liger"): {"ms": 2.0} for name in names}
    (goal,) = (g for g in goals.kernel_goals(FULL) if "all sizes" in g.name)
    assert goal.report({"micro": rows})["figure"] is None
    rows |= {micro.by(name, "compile"): {"failed": "no"} for name in names}
    assert goal.report({"micro": rows})["figure"] == 1.5
    rows[micro.by(names[0], "compile")] = {"ms": 1.0}
    assert goal.report({"micro": rows})["figure"] == 3.0


@pytest.mark.slow
def test_every_alternative_runs(
    tmp_path: Path, stand_in: None, triton_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At tiny sizes torch.compile traces, but translates nothing."""
    monkeypatch.setattr(micro, "COPIES", 1)
    section = Chosen("micro", tmp_path / "micro.jsonl", 600.0)
    section.names = {name for name in listed(LEAST, "micro", tmp_path, tiny=True) if " by " in name}
    micro.run(section, LEAST, CPU, tiny=True)
    rows = {name: row for name, row in section.rows.items() if name != "ceilings"}
    assert rows.keys() == section.names and [row for row in rows.values() if "ms" not in row] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_tiny_sizes_give_every_goal_of_a_section_its_figure(
    name: str, tmp_path: Path, stand_in: None, triton_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that goals read, run in the interpreter; of the kernels' checks two operators."""
    pytest.importorskip("peft")
    monkeypatch.setattr(micro, "COPIES", 1)
    monkeypatch.setattr(same_bits, "STEPS", 1)
    monkeypatch.setattr(same_bits, "TRIED", ("lora",))
    asked = Asked(listed(LEAST, name, tmp_path, tiny=True))
    expected = {goal["goal"] for goal in goals.report({name: asked}, LEAST) if goal["figure"] is not None}
    section = Chosen(name, tmp_path / f"{name}.jsonl", 600.0)
    section.names = asked.read or {row for row in asked if row.startswith(("label_loss", "glu silu"))}
    MODULES[name].run(section, LEAST, CPU, tiny=True)
    assert [row for row in section.rows.values() if row.get("ok") is False] == []
    rows = Section.open(name, tmp_path, 0.0, fresh=False).rows
    report = {goal["goal"]: goal for goal in goals.report({name: rows}, LEAST) if goal["goal"] in expected}
    assert expected and [goal for goal in expected if report[goal]["figure"] is None] == []
    assert all(goal["met"] for goal in report.values() if "same bits" in goal["goal"])


def test_a_goal_ends_with_a_verdict_where_figures_count() -> None:
    aims = [at_most("a", 1.0, "x", read("s", "r", key)) for key in ("small", "large", "absent")]
    report = [goal.report({"s": {"r": {"small": 0.5, "large": 2.0}}}) for goal in aims]
    verdicts = [line.split("  ")[-1].strip() for line in lines(report, counts=True)]
    assert verdicts == ["met", "not met", "not measured"]
    assert "not met" not in "".join(lines(report, counts=False))


@pytest.mark.parametrize(("fp32", "bf16", "speedup", "said"), [(100, 125, 1.6, "bf16"), (125, 100, 1.6, "fp32")])
def test_the_faster_of_pefts_adapters_counts(fp32: int, bf16: int, speedup: float, said: str) -> None:
    ours, theirs = step.settings(FULL)[0].name, dict(zip(hf_step.rows(step.HF), (fp32, bf16), strict=True))
    rows = {name: {"tokens_per_second": speed, "at_once": 2} for name, speed in {ours: 200, **theirs}.items()}

    def goal() -> dict[str, Any]:
        (found,) = (g for g in goals.report({"step": rows}, FULL) if g["goal"] == "LoRA step, speed over HF + PEFT")
        return found

    assert goal()["figure"] == speedup and goal()["met"] is False and f"{said} adapters" in goal()["note"]
    rows[hf_step.rows(step.HF)[1]] = {"ok": False}
    assert goal()["figure"] == 200 / fp32 and "fp32 adapters" in goal()["note"], "it failed, so the other counts"
    del rows[hf_step.rows(step.HF)[1]]
    assert goal()["figure"] is None, "not tried yet"


def test_pefts_adapters_are_of_the_dtype_asked_for() -> None:
    pytest.importorskip("peft")
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        tuned = hf_step.with_lora(hf_step.base_model(TINY, CPU).bfloat16(), TINY, bf16=bf16)
        assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {dtype}


def test_a_row_that_raises_is_kept_and_tried_again(tmp_path: Path) -> None:
    section = Section.open("micro", tmp_path, 60.0, fresh=False)
    with section.attempt("a"):
        raise ValueError("no such tile\nand more")
    assert section.rows["a"]["ok"] is False and section.rows["a"]["failed"] == "ValueError: no such tile"
    assert Section.open("micro", tmp_path, 60.0, fresh=False).wants("a")


def test_a_row_that_raises_leaves_its_tensors(tmp_path: Path) -> None:
    """Without the help of the collector of cycles: the next row needs the memory."""
    section, kept = Section.open("micro", tmp_path, 60.0, fresh=False), []

    def fail() -> None:
        tensor = torch.ones(3)
        kept.append(weakref.ref(tensor))
        raise RuntimeError(f"CUDA out of memory with {tensor.numel()}")

    gc.disable()
    try:
        with section.attempt("a"):
            fail()
        assert kept[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "speaker", ["CUDA error: {}\nKernel errors might be reported later.", "Triton Error [CUDA]: {}"]
)
@pytest.mark.parametrize(
    "words", ["an illegal memory access was encountered", "device-side assert triggered", "misaligned address",
              "unspecified launch failure"],
)  # fmt: skip
def test_what_loses_the_device_ends_the_section(tmp_path: Path, speaker: str, words: str) -> None:
    section = Section.open("micro", tmp_path, 60.0, fresh=False)
    section.add("before", ms=1.0)
    with pytest.raises(DeviceLost, match=words), section.attempt("guilty"):
        raise RuntimeError(speaker.format(words))
    again = Section.open("micro", tmp_path, 60.0, fresh=False)
    assert again.rows["guilty"]["ok"] is False and again.rows["before"]["ms"] == 1.0
    assert not again.wants("guilty") and again.wants("after"), "what ended the process is not tried before --fresh"


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory",
     "Triton Error [CUDA]: too many resources requested for launch", "out of resource: shared memory, Required: 9"],
)  # fmt: skip
def test_a_device_that_is_too_small_is_not_lost(tmp_path: Path, message: str) -> None:
    section = Section.open("micro", tmp_path, 60.0, fresh=False)
    with section.attempt("large"):
        raise RuntimeError(message)
    assert section.wants("after") and Section.open("micro", tmp_path, 60.0, fresh=False).wants("large")


def test_a_device_that_does_not_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: unknown error")

    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx")
    assert not lost(error)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert lost(error)


def test_a_long_row_waits_for_a_call_with_time_for_it(tmp_path: Path) -> None:
    section = Section.open("grid", tmp_path, 60.0, fresh=False)
    assert not section.wants("long", takes=61.0) and section.wants("short", takes=1.0)
    assert section.left == ["long"]


def test_extra_bytes_are_those_above_inputs_and_results() -> None:
    x = torch.ones(1000)

    def call() -> tuple[torch.Tensor, ...]:
        doubled = x * 2
        return (doubled[:10] + 1,)

    assert peak.extra_bytes(call, [x], CPU) == x.nbytes


def test_head_and_loss_hold_their_logits_and_rows_of_labels(tmp_path: Path, triton_kernels: None) -> None:
    section = Section.open("micro", tmp_path, 60.0, fresh=False)
    head_loss.run(section, TINY, CPU, tiny=True)
    every, some = (section.rows[head_loss.row_name(share)] for share in (1, head_loss.SPARSE))
    assert every["labels"] == TINY.tokens and some["labels"] == -(-TINY.tokens // head_loss.SPARSE)
    row = 2 * (TINY.config().vocab_size + 2 * TINY.config().hidden_size)
    assert every["extra_bytes"] >= TINY.tokens * row > some["extra_bytes"]
