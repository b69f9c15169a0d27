"""From a model's name to its config, weights and tokens.

A name is a local folder, a ``.gguf`` file, a built-in name, or a hub id. Nothing is downloaded
unless the name is no local one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peftdyno.engine.builtin_configs import builtin_config, builtin_names, find_builtin
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families import Family, config_from_hf, family_of
from peftdyno.engine.families.hf_config import eos_ids
from peftdyno.engine.model_cache import sha256_of
from peftdyno.engine.quant import load_quantised_weights
from peftdyno.engine.tokenizer import TOKENIZER_FILES, Tokenizer
from peftdyno.engine.weight_files import (
    SafetensorsSource,
    TensorSource,
    load_weights,
    read_json,
    safetensors_files,
)
from peftdyno.engine.weights import DecoderWeights

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model's parts lie and where they came from."""

    name: str
    """As the user gave it."""
    config: DecoderConfig
    weight_files: tuple[Path, ...]
    tokenizer_folder: Path | None
    source: Mapping[str, str]
    """Origin: ``kind`` (folder, gguf, hub, wheel) and what identifies it (revision or sha256)."""

    @property
    def family(self) -> Family:
        """The family that names the tensors."""
        return family_of(self.config)

    def describe(self) -> str:
        """The origin in one line."""
        kind, *rest = self.source.items()
        return f"{kind[1]}: " + ", ".join(f"{key} {value}" for key, value in rest)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every weight file by name; reads them whole."""
        return {path.name: sha256_of(path) for path in self.weight_files}

    def tokenizer_files(self) -> dict[str, bytes]:
        """Content of the tokenizer's files by name, for `save_model`."""
        if self.tokenizer_folder is None:
            return {}
        paths = [self.tokenizer_folder / name for name in TOKENIZER_FILES]
        return {path.name: path.read_bytes() for path in paths if path.exists()}

    def tensors(self) -> TensorSource:
        """The stored weights."""
        if self.weight_files[0].suffix == ".gguf":
            from peftdyno.engine.gguf_file import GGUFFile

            return GGUFFile(self.weight_files[0])
        return SafetensorsSource(self.weight_files)


def load_model(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: str | None = None,
) -> tuple[DecoderConfig, DecoderWeights, Tokenizer | None, ModelFiles]:
    """Config, weights in the given dtype and place, and tokenizer (None where the model has none).

    With `quant`, a kind of `quant.QUANTISATIONS`, linear weights are quantised one by one as they are read.
    """
    files = resolve_model(name)
    tokenizer = None if files.tokenizer_folder is None else Tokenizer.load(files.tokenizer_folder)
    if quant is None:
        weights = load_weights(files.config, files.tensors(), dtype, device)
    else:
        weights = load_quantised_weights(files.config, files.tensors(), quant, dtype, device)
    return files.config, weights, tokenizer, files


def resolve_model(name: str | Path) -> ModelFiles:
    """Finds a model's files, downloading or converting where the name asks for it.

    Raises UserError for an unknown name (with the closest known ones) and for unreadable files.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return folder_model(path, str(name), {"kind": "folder", "path": str(path)})
    if path.suffix == ".gguf":
        return gguf_model(path, str(name))
    if path.is_file():
        raise UserError(f"{path}: expected a model folder or a .gguf file")
    files = _named_model(str(name))
    logger.info("%s from %s", name, files.describe())
    return files


def _named_model(name: str) -> ModelFiles:
    builtin = find_builtin(name)
    if builtin is not None and "smollm2-135m" in builtin.short_names and "/" not in name:
        from peftdyno.engine.smollm2 import smollm2_folder

        folder, source = smollm2_folder()
        return folder_model(folder, name, source)
    if builtin is not None and "/" not in name:
        return hub_model(builtin.hub_ids[0], name)
    if _is_hub_id(name):
        return hub_model(name, name)
    raise _not_found(name)


def _not_found(name: str) -> UserError:
    if name.startswith(("/", "./", "../", "~")):
        return UserError(f"{name}: no such model folder")
    return unknown("model", name, builtin_names())


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and rest) and "/" not in rest and owner not in ("", ".", "..", "~")


def hub_model(hub_id: str, name: str) -> ModelFiles:
    """A model of the hub, from the hub's local cache where it lies there whole."""
    from peftdyno.engine.hub import hub_folder

    folder, revision = hub_folder(hub_id)
    return folder_model(folder, name, {"kind": "hub", "id": hub_id, "revision": revision})


def folder_model(folder: Path, name: str, source: Mapping[str, str]) -> ModelFiles:
    """The files of a folder as `save_pretrained` writes it."""
    config = read_config(folder)
    has_tokenizer = (folder / "tokenizer.json").exists()
    return ModelFiles(
        name=name,
        config=config,
        weight_files=tuple(safetensors_files(folder)),
        tokenizer_folder=folder if has_tokenizer else None,
        source=source,
    )


def gguf_model(path: Path, name: str) -> ModelFiles:
    """The config and weights of a GGUF file; its tokenizer is written once to the cache."""
    from peftdyno.engine.gguf_file import GGUFFile
    from peftdyno.engine.gguf_tokenizer import gguf_tokenizer_folder

    gguf = GGUFFile(path)
    digest = sha256_of(path)
    return ModelFiles(
        name=name,
        config=gguf.config(),
        weight_files=(path,),
        tokenizer_folder=gguf_tokenizer_folder(gguf, digest),
        source={"kind": "gguf", "path": str(path), "sha256": digest},
    )


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder, with the end tokens that its generation settings add."""
    path = folder / "config.json"
    config = _named_errors(path, read_json(path))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    declared = eos_ids(read_json(generation))
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *declared))))


def _named_errors(path: Path, fields: Mapping[str, Any]) -> DecoderConfig:
    try:
        return config_from_hf(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def resolve_config(name: str | Path) -> DecoderConfig:
    """The config alone, for predictions: a built-in shape needs no files, a hub id only its config.json."""
    path = Path(name).expanduser()
    if path.is_dir():
        return read_config(path)
    if path.suffix == ".gguf":
        from peftdyno.engine.gguf_file import GGUFFile

        return GGUFFile(path).config()
    config = builtin_config(str(name))
    if config is not None:
        return config
    if _is_hub_id(str(name)):
        from peftdyno.engine.hub import hub_config_folder

        return read_config(hub_config_folder(str(name)))
    raise _not_found(str(name))
