"""A model's name leads to a folder, a file, a built-in model or the hub, and to nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from peftdyno.engine.errors import UserError
from peftdyno.engine.sources import load_model, resolve_config, resolve_model
from peftdyno.engine.weight_files import save_model
from peftdyno.engine.weights import random_weights

from .test_weights import SMALL

REVISION = "0123abcd"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with the one model `owner/small`, empty at first in the local cache; returns the calls made."""
    folder = tmp_path / "snapshots" / REVISION
    calls: list[dict[str, Any]] = []

    def snapshot_download(hub_id: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only and not folder.exists():
            raise FileNotFoundError("not cached")
        if not local_files_only:
            calls.append({"id": hub_id, **options})
            if hub_id != "owner/small":
                raise RuntimeError(f"404 Client Error.\n\nRepository Not Found for {hub_id}\nmore lines")
            save_model(folder, random_weights(SMALL), SMALL)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id(hub: list[dict[str, Any]]) -> None:
    config, _, tokenizer, files = load_model("owner/small")
    assert config == SMALL
    assert tokenizer is None
    assert files.describe() == f"hub: id owner/small, revision {REVISION}"
    patterns = hub[0]["allow_patterns"]
    assert "model*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", ".py", "*"))]
    load_model("owner/small")
    assert len(hub) == 1


def test_a_model_cached_in_part_is_fetched_whole(hub: list[dict[str, Any]]) -> None:
    folder = resolve_model("owner/small").weight_files[0].parent
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    (folder / "config.json").unlink()
    resolve_model("owner/small")
    assert len(hub) == 2


def test_what_the_hub_says_is_one_line(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError) as caught:
        load_model("owner/absent")
    assert str(caught.value) == (
        "model 'owner/absent' is neither local nor could be fetched from the hub: 404 Client Error."
    )


def test_builtin_shape_is_taken_from_its_hub_id(hub: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="meta-llama/Meta-Llama-3-8B-Instruct"):
        load_model("llama-3-8b")
    assert not [call for call in hub if call["id"] != "meta-llama/Meta-Llama-3-8B-Instruct"]
    assert resolve_config("llama-3-8b").num_hidden_layers == 32
    assert len(hub) == 1


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected a model folder or a \.gguf file"):
        load_model(tmp_path / "model.safetensors")
    for name in ("a/b/c", "absent"):
        with pytest.raises(UserError, match=f"unknown model '{name}'"):
            load_model(name)
    for name in ("./absent", "~/absent/", "/absent/model"):
        with pytest.raises(UserError, match=f"{name}: no such model folder"):
            load_model(name)


def test_importing_stays_light() -> None:
    heavy = ("transformers", "datasets", "pandas", "huggingface_hub", "gguf")
    line = f"import sys, peftdyno.engine.sources; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
