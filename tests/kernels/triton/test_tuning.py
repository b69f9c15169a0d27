"""Tiles and forms: shipped for every architecture, overridden by what was measured, and never trusted unread."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from peftdyno.kernels import tuning
from peftdyno.kernels.triton import tune
from peftdyno.kernels.triton.tune_subjects import FormSubject, Product, Subject, TuneSizes, form_subjects, subjects
from peftdyno.kernels.tuning import Tile

CPU = torch.device("cpu")
SIZES = TuneSizes(
    tokens=20,
    products=(Product(columns=64, outs=(16, 8)), Product(columns=128, outs=(16,))),
    rank=16,
    runs=2,
    heads=2,
    key_heads=1,
    head_dim=16,
)
ADDED = (20, 64, 16)
ADD = tuning.shape_class("lora_add", ADDED)


def test_every_kernel_ships_a_tile_for_every_architecture() -> None:
    for kernel, tiles in tuning.SHIPPED.items():
        assert sorted(tiles) == [80, 90, 100], kernel
        for tile in tiles.values():
            assert tile.rows & (tile.rows - 1) == tile.columns & (tile.columns - 1) == 0, (kernel, tile)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 80),
        ((8, 9), 80),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 80),
        ((12, 1), 80),
    ],
)
def test_gpus_with_little_shared_memory_take_the_smallest_tiles(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tuning.architecture(torch.device("cuda")) == arch


def test_wide_elements_have_tiles_of_their_own() -> None:
    assert tuning.SHIPPED.keys() - tuning.SHIPPED_FP32.keys() == {"lora_output_gradient"}, "taken for 16 bits only"
    for kernel, tile in tuning.SHIPPED_FP32.items():
        assert tuning.tile(kernel, (1, 2), CPU, torch.float32) == tile
        assert tuning.tile(kernel, (1, 2), CPU, torch.bfloat16) == tuning.SHIPPED[kernel][90]


def test_a_trial_ends() -> None:
    tile = Tile(16, 16, 4, 1)
    with tuning.trial(ADD, tile), tuning.trial_form("lora_linear", "plain"):
        assert tuning.tile("lora_add", ADDED, CPU, torch.float16) == tile
        assert tuning.tile("lora_add", (20, 64, 32), CPU, torch.float16) == tuning.SHIPPED["lora_add"][90]
        assert tuning.form("lora_linear", (1, 2, 3, 4), CPU) == "plain"
    assert tuning.tile("lora_add", ADDED, CPU, torch.float16) == tuning.SHIPPED["lora_add"][90]
    assert tuning.form("lora_linear", (1, 2, 3, 4), CPU) == "bordered"


def test_what_was_measured_is_saved_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tile, name = Tile(64, 64, 4, 2), tuning.shape_class("lora_linear", (8000, 64, 96, 16))
    wide = tuning.shape_class("attention/128", (8000, 32, 8, 128))
    file = tuning.save(CPU, {ADD: {"tile": tile, "ms": 1.0}, "no kernel/8": {"tile": tile}, "lora_add": {"tile": tile}})
    tuning.save(CPU, {wide: {"tile": tile, "ms": 2.0}, name: {"form": "fused", "ms": {"fused": 1.0}}})
    found = tuning._measured(file)
    assert found.tiles == {ADD: tile, wide: tile} and found.forms == {name: "fused"}
    file.write_text(f'{{"{ADD}": {{"tile": {{"rows": 1}}}}}}')
    tuning._measured.cache_clear()
    with pytest.raises(ValueError, match="delete it and run"):
        tuning._measured(file)


def test_measured_choices_hold_for_their_shape_class_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = tuning.shape_class("lora_linear", (5000, 64, 96, 16))
    found = tuning.Measured({ADD: Tile(16, 16, 4, 1)}, {name: "plain"})
    monkeypatch.setattr(tuning, "measured", lambda device: found)
    assert tuning.form("lora_linear", (8192, 64, 96, 16), CPU) == "plain"
    assert tuning.form("lora_linear", (4096, 64, 96, 16), CPU) == "bordered"
    assert tuning.form("lora_linear", (8192, 64, 96, 32), CPU) == "bordered"
    sizes = [(17, 64, 16), (32, 64, 16), (33, 64, 16), (16, 64, 16), (20, 128, 16), (20, 64, 32)]
    assert [tuning.tile("lora_add", s, CPU, torch.float16).rows for s in sizes] == [16, 16, 64, 64, 64, 64]
    assert tuning.tile("lora_add", ADDED, CPU, torch.float32) == tuning.SHIPPED_FP32["lora_add"]
    picked = tuning.picked(CPU)
    assert picked[ADD] == "16x16, 4 warps, 1 stages (measured here)" and "shipped for sm_90" in picked["lora_add"]
    assert picked[name] == "plain (measured here)" and "default" in picked["lora_linear"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what was measured here would count")
def test_few_tokens_have_a_default_of_their_own() -> None:
    gpu = torch.device("cuda")
    assert [tuning.form("nf4_linear", (n, 64, 64), gpu) for n in (1, 16, 17)] == ["fused", "fused", "dequantise"]
    assert tuning.form("nf4_linear", (1, 64, 64), CPU) == "dequantise", "no kernel there"
    assert tuning.form("lora_linear", (1, 64, 64, 8), gpu) == "bordered"


def test_every_tile_has_a_subject(device: torch.device) -> None:
    found = list(subjects(SIZES, device))
    names = {subject.kernel for subject in found}
    assert all(subject.name.startswith(f"{subject.kernel}/") for subject in found)
    others = {name for name in tuning.SHIPPED if name.split("/")[-1] in ("128", "256")}
    assert names == set(tuning.SHIPPED) - others
    for kernel, tiles in tuning.SHIPPED.items():
        found = tune.neighbours(tiles[90])
        assert tiles[90] not in found and len(set(found)) == len(found) > 4, kernel


def test_every_form_has_a_subject_whose_forms_agree(device: torch.device, triton_kernels: None) -> None:
    operators = set()
    for subject in form_subjects(SIZES, device):
        entry = tune.fastest_form(subject, lambda call: 1.0)
        assert list(entry["ms"].values()) == [1.0] * len(subject.forms), (subject.name, entry)
        operators.add(subject.operator)
        library = subject.operator.startswith("attention") and device.type != "cuda"
        every = tuning.FORMS[subject.operator]
        assert subject.forms == (every[:1] if library else every), "the sizes allow every form there is a library for"
    assert operators == set(tuning.FORMS)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The shape classes for which launches have asked for a tile."""
    found: set[str] = set()
    take = tuning.tile

    def watched(kernel: str, shape: tuple[int, ...], *where: Any) -> Tile:
        found.add(tuning.shape_class(kernel, shape))
        return take(kernel, shape, *where)

    monkeypatch.setattr(tuning, "tile", watched)
    return found


def test_every_subject_takes_the_tile_of_its_class(device: torch.device, asked: set[str]) -> None:
    """The class under which a tile is kept is that of the launch; else what was measured would never be taken."""
    for sizes in (SIZES, replace(SIZES, runs=1), replace(SIZES, products=(Product(columns=128, outs=(64,)),))):
        for subject in subjects(sizes, device):
            asked.clear()
            subject.call()
            assert subject.name in asked, (subject.name, asked)


def test_classes_of_a_step_are_those_that_are_tuned(
    device: torch.device, triton_kernels: None, asked: set[str]
) -> None:
    """Operators as a model calls them, in every form, ask for no class of a low-rank kernel that has no subject."""
    tuned = {subject.name for subject in subjects(SIZES, device)}
    asked.clear()
    for choice in form_subjects(SIZES, device):
        for form in choice.forms:
            with tuning.trial_form(choice.operator, form):
                choice.call()
    short = {name for name in asked if name.startswith("attention/decode/")}  # a plan's key has both forward tiles
    assert len(asked) > 8 and asked - short <= tuned, asked - tuned


def counted(times: Callable[[Tile], float]) -> Any:
    """A timer that reads the tile in force."""
    return lambda call: times(tuning.tile("lora_add", ADDED, CPU, torch.float16))


def test_tiles_are_climbed_to_the_fastest() -> None:
    goal = Tile(256, 32, 4, 2)

    def distance(tile: Tile) -> float:
        pairs = zip((tile.rows, tile.columns, tile.warps), (goal.rows, goal.columns, goal.warps), strict=True)
        return 10.0 + sum(max(a, b) / min(a, b) for a, b in pairs) + abs(tile.stages - goal.stages)

    subject = Subject("lora_add", ADDED, lambda: torch.ones(3))
    entry = tune.fastest_tile(subject, CPU, counted(distance))
    assert entry["tile"] == goal and entry["ms"] == distance(goal) < entry["shipped_ms"]
    same = tune.fastest_tile(subject, CPU, counted(lambda tile: 1.0 - 1e-4 * tile.rows))
    assert same["tile"] == tuning.SHIPPED["lora_add"][90], "differences within the margin change nothing"


def test_a_tile_with_other_results_is_not_taken() -> None:
    rows = lambda: float(tuning.tile("lora_add", ADDED, CPU, torch.float16).rows)  # noqa: E731
    subject = Subject("lora_add", ADDED, lambda: torch.full((3,), rows()))
    entry = tune.fastest_tile(subject, CPU, counted(lambda tile: 1.0 / tile.rows))
    assert entry["tile"].rows == tuning.SHIPPED["lora_add"][90].rows


def test_decoding_is_tuned_by_its_own_tile(device: torch.device) -> None:
    """The call takes the tile under trial, which has no part in the other widths."""
    found = [s for s in subjects(SIZES, device) if s.kernel == "attention/decode"]
    assert [s.shape[0] for s in found] == [1, 16]
    for decode in found:
        truth = decode.call()
        for tile in (Tile(16, 16, 4, 1), Tile(32, 32, 4, 2)):
            with tuning.trial(decode.name, tile):
                torch.testing.assert_close(decode.call(), truth)
        assert truth.shape == (decode.shape[0], SIZES.heads * SIZES.head_dim)


@pytest.mark.parametrize("error", [PTXASError("out of registers"), OutOfResources(300_000, 232_448, "shared memory")])
def test_a_tile_that_cannot_be_built_is_passed_over(error: Exception) -> None:
    def call() -> torch.Tensor:
        if tuning.tile("lora_add", ADDED, CPU, torch.float16) != tuning.SHIPPED["lora_add"][90]:
            raise error
        return torch.ones(3)

    entry = tune.fastest_tile(Subject("lora_add", ADDED, call), CPU, counted(lambda tile: 1.0 / tile.rows))
    assert entry["tile"] == tuning.SHIPPED["lora_add"][90]


def test_the_fastest_right_form_is_taken() -> None:
    def run(times: dict[str, float], value: Callable[[str], float]) -> dict[str, Any]:
        def current() -> str:
            return tuning.form("lora_linear", (1, 1, 1, 1), CPU)

        call = lambda: torch.full((2,), value(current()))  # noqa: E731
        subject = FormSubject("lora_linear", (1, 1, 1, 1), tuning.FORMS["lora_linear"], call)
        return tune.fastest_form(subject, lambda call: times[current()])

    times = {"bordered": 3.0, "plain": 2.0, "fused": 1.0}
    assert run(times, lambda form: 1.0)["form"] == "fused"
    wrong = run(times, lambda form: 2.0 if form == "fused" else 1.0)
    assert wrong["form"] == "plain" and wrong["ms"]["fused"] is None
    assert run(dict.fromkeys(times, 1.0) | {"fused": 0.99}, lambda form: 1.0)["form"] == "bordered"


def test_tuning_reports_and_keeps_tiles_for_the_forms(device: torch.device) -> None:
    told: list[str] = []
    found = tune.tune(SIZES, device, "lora_add", timer=lambda call: 1.0, report=lambda name, entry: told.append(name))
    assert list(found) == told and len(told) == len(SIZES.products) and found[ADD]["ms"] == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed() -> None:
    with pytest.raises(ValueError, match="this machine has none"):
        tune.milliseconds([lambda: None], CPU)
