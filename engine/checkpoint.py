"""Checkpoints of a training run: tensors in safetensors, the rest in JSON with their hash, the newest two kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftdyno.engine.atomic import remove_partials, whole_folder

KEPT = 2
"""Checkpoints kept: the newest, and the one before for when the newest does not load."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: tensors by name, and everything else as JSON values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `folder/step-N` atomically and drop all but the newest checkpoints. UserError where the disk is full."""
    with whole_folder(folder / f"step-{step:08d}") as target:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, target / "state.safetensors")
        record = {"step": step, "sha256": _digest(target / "state.safetensors"), "values": dict(values)}
        (target / "state.json").write_text(json.dumps(record, indent=1))
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None; and a line for each newer one that is not."""
    remove_partials(folder)
    complaints: list[str] = []
    for path in reversed(_folders(folder)):
        try:
            return _load(path), complaints
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            complaints.append(f"checkpoint {path} does not load ({error}); taking the one before")
    return None, complaints


def _load(path: Path) -> Checkpoint:
    record = json.loads((path / "state.json").read_text())
    digest = _digest(path / "state.safetensors")
    if digest != record["sha256"]:
        raise ValueError("state.safetensors is not what state.json says was written")
    return Checkpoint(record["step"], load_file(path / "state.safetensors"), record["values"])


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
