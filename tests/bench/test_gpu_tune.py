"""Tuning by the GPU machine's command: kept with the results, taken up where it stopped, compared with what ships."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from peftdyno.bench.gpu import micro, step, tune
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import TINY
from peftdyno.bench.gpu.timing import Ceilings
from peftdyno.kernels import tuning
from peftdyno.kernels.triton.tune_subjects import FormSubject, Subject

CPU = torch.device("cpu")
SHAPE = (40, 64, 64, 16)


@pytest.fixture
def subjects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two kernels and an operator, the cache in a folder of the test, and readable without a GPU."""
    call = lambda: torch.ones(1)  # noqa: E731
    kernels = [Subject(kernel, SHAPE, call) for kernel in ("lora_add", "lora_outer", "lora_outer")]
    forms = [FormSubject("lora_linear", SHAPE, tuning.FORMS["lora_linear"], call)]
    monkeypatch.setattr(tune, "subjects", lambda *_: iter(kernels))
    monkeypatch.setattr(tune, "form_subjects", lambda *_: iter(forms))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def found() -> tuning.Measured:
    return tuning._measured(tuning.cache_file(CPU))


def test_every_kernel_is_tuned_once(subjects: None, tmp_path: Path) -> None:
    short = Section.open("tune", tmp_path, tune.TAKES - 1, fresh=False)
    tune.tune(short, TINY, CPU, lambda call: 1.0)
    names = [tuning.shape_class(name, SHAPE) for name in ("lora_add", "lora_outer", "lora_linear")]
    assert short.left == names and not short.rows
    section = Section.open("tune", tmp_path, tune.TAKES + 60, fresh=False)
    tune.tune(section, TINY, CPU, lambda call: 1.0)
    assert [*section.rows] == short.left and not section.left
    assert [*found().tiles] == names[:2] and set(found().forms.values()) == {"bordered"}
    again = Section.open("tune", tmp_path, 0.0, fresh=False)
    tune.tune(again, TINY, CPU, lambda call: pytest.fail("measured again"))
    assert again.rows == section.rows and not again.left


def test_what_ships_is_timed_beside_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts here is which choices hold while the call runs."""
    (row,) = (row for row in micro.timed(TINY, CPU) if row.name == "glu silu")
    seen: list[bool] = []
    monkeypatch.setattr(micro, "_time", lambda *_: seen.append(tuning._shipped_only) or 1.0)
    top = Ceilings(1.0, 1.0)
    assert "untuned_ms" not in micro._row(row, CPU, top, tiny=True) and seen == [False]
    monkeypatch.setattr(tuning, "measured", lambda device: tuning.Measured(forms={"glu_down/8": "together"}))
    assert micro._row(row, CPU, top, tiny=True)["untuned_ms"] == 1.0 and seen == [False, False, True]


def test_a_step_is_timed_untuned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(step, "times", lambda call, *_: seen.append(tuning._shipped_only) or 2.0 - len(seen))
    monkeypatch.setattr(tuning, "measured", lambda device: tuning.Measured(forms={"glu_down/8": "together"}))
    row = step._step(step.settings(TINY)[0], TINY, CPU, tiny=True)
    assert seen == [False, True] and (row["seconds"], row["untuned_seconds"]) == (1.0, 0.0)


def test_untuned_takes_what_ships(subjects: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's cache with another tile counts but within `untuned`."""
    cuda, mine = torch.device("cuda"), tuning.Tile(16, 16, 4, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tuning, "_cache_file", lambda device, home: Path("none"))
    monkeypatch.setattr(
        tuning, "_measured", lambda file: tuning.Measured(tiles={tuning.shape_class("lora_add", SHAPE): mine})
    )
    assert tuning.tile("lora_add", SHAPE, cuda, torch.bfloat16) == mine
    with tuning.untuned():
        assert tuning.tile("lora_add", SHAPE, cuda, torch.bfloat16) == tuning.SHIPPED["lora_add"][90]
    assert tuning.tile("lora_add", SHAPE, cuda, torch.bfloat16) == mine
