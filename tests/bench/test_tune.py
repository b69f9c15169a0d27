"""`peftdyno tune`: a model's shapes, what is kept, and one clear line where there is nothing to measure on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftdyno.engine.sources import resolve_config
from peftdyno.kernels import cpu, tuning
from peftdyno.kernels.tuning import Tile

pytest.importorskip("triton")


def test_sizes_are_the_models() -> None:
    from peftdyno.bench.tuning import tune_sizes
    from peftdyno.kernels.triton.tune_subjects import TuneSizes

    assert tune_sizes(resolve_config("llama-3-8b"), tokens=8192, rank=16, runs=1) == TuneSizes()
    small = tune_sizes(resolve_config("smollm2-135m"), tokens=64, rank=8, runs=4)
    assert [(p.columns, p.outs) for p in small.products] == [
        (576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)),
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(shell: Any) -> None:
    result = shell("tune")
    assert result.status == 2 and result.err.count("\n") == 1 and "no CUDA device" in result.err


def test_what_it_finds_is_kept_and_shown(shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device and a timer that are not there."""
    from peftdyno.kernels.triton import tune

    asked: list[Any] = []
    name = tuning.shape_class("lora_linear", (8192, 576, 960, 48))
    add, outer = (tuning.shape_class(kernel, (8192, 576, 16)) for kernel in ("lora_add", "lora_outer"))

    def fake(sizes: Any, device: Any, only: str, *, report: Any) -> dict[str, Any]:
        asked.append((sizes, only))
        entries = {
            add: {"tile": Tile(64, 64, 4, 2), "ms": 0.5, "shipped_ms": 0.7},
            name: {"form": "plain", "ms": {"bordered": 2.0, "plain": 1.0, "fused": None}},
        }
        found = {key: entry for key, entry in entries.items() if only in key}
        for key, entry in found.items():
            report and report(key, entry)
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "no-such-gpu")
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    tuning._cache_file.cache_clear()
    monkeypatch.setattr(tune, "tune", fake)
    result = shell("tune", "--model", "smollm2-135m", "--rank", "16")
    assert result.status == 0, result.err
    assert "fused wrong" in result.err and "0.500 ms, 0.700 as shipped" in result.err
    assert "measured here" in result.out and asked[0][0].rank == 16
    kept = json.loads(tuning.cache_file(torch.device("cuda", 0)).read_text())
    assert kept[name]["form"] == "plain" and kept[add]["tile"]["rows"] == 64
    assert json.loads(shell("tune", "--only", "add", "--json").out).keys() == {add, "file"}

    def interrupted(sizes: Any, device: Any, only: str, *, report: Any) -> dict[str, Any]:
        report(outer, {"tile": Tile(64, 64, 8, 2), "ms": 0.5, "shipped_ms": 0.7})
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(tune, "tune", interrupted)
    with pytest.raises(RuntimeError, match="gone"):
        shell("tune")
    assert tuning.measured(torch.device("cuda", 0)).tiles[outer] == Tile(64, 64, 8, 2), "kept as it was found"
    monkeypatch.setattr(tune, "tune", fake)
    asked.clear()
    shell("tune", "--tokens", "512", "--tokens", "64")
    assert [sizes.tokens for sizes, _ in asked] == [512, 64]
    wrong = shell("tune", "--only", "nothing")
    assert wrong.status == 2 and "--only nothing" in wrong.err


def test_graphs_that_cannot_be_are_one_line(shell: Any, tiny_model: Path) -> None:
    result = shell("generate", "--model", str(tiny_model), "--graphs", "always", "Name a river.")
    assert result.status == 2 and result.err.count("\n") == 1 and "--graphs" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which reference kernels are not recorded")
@pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ kernels, which replay tapes, are not built")
def test_graphs_on_a_cpu_give_the_same_text(shell: Any, tiny_model: Path) -> None:
    found = [shell("generate", "--model", str(tiny_model), "--graphs", c, "Name a river.") for c in ("on", "off")]
    assert [r.status for r in found] == [0, 0] and found[0].out == found[1].out
