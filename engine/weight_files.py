"""Base weights from and to safetensors files, streamed tensor by tensor into their fused places."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import Family, family_of
from peftdyno.engine.model_cache import publish_folder, write_manifest
from peftdyno.engine.weights import DecoderWeights, empty_weights, layer_parts, part_shape

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = {"F64", "F32", "F16", "BF16"}


class TensorSource(Protocol):
    """Named tensors that can be read one at a time, under the names of a Hugging Face checkpoint."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the floating-point dtype it is stored in."""
        ...

    def place(self, name: str | None = None) -> str:
        """The file that holds a tensor, or that ought to, for messages."""
        ...


class SafetensorsSource:
    """The tensors of one or several safetensors files; raises UserError where a file cannot be read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._handles: dict[str, Any] = {}
        self._places: dict[str, Path] = {}
        for path in self.files:
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            handle = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or corrupt safetensors file ({error}); fetch it again") from error
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if name in self._places:
                raise UserError(f"tensor '{name}' is in both {self._places[name]} and {path}")
            self._handles[name], self._places[name] = handle, path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the headers."""
        return {name: tuple(h.get_slice(name).get_shape()) for name, h in self._handles.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; raises UserError where it is not a floating-point one."""
        stored = self._handles[name].get_slice(name).get_dtype()
        if stored not in STORED_DTYPES:
            raise UserError(
                f"{self.place(name)}: tensor '{name}' is stored as {stored}, expected one of "
                f"{', '.join(sorted(STORED_DTYPES))}"
            )
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor

    def place(self, name: str | None = None) -> str:
        """The file of a tensor; the folder or the only file where no tensor is meant."""
        if name in self._places:
            return str(self._places[name])
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: the single one, or all that the index names."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if not index.exists():
        if not single.exists():
            raise UserError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} found (only safetensors are read)")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: field 'weight_map' is missing or empty")
    files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: missing, though {INDEX_FILE} names it")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def to_state_dict(weights: DecoderWeights, config: DecoderConfig, family: Family | None = None) -> dict[str, Tensor]:
    """Views of all weights under their Hugging Face names; a tied head is left out.

    Writing into the views writes into `weights`. UserError where they are in 4 bits.
    """
    weights.require_dense("store")
    family = family or family_of(config)
    state = {
        family.tensor_name("embed.weight"): weights.embed,
        family.tensor_name("final_norm.weight"): weights.final_norm,
    }
    if weights.head is not weights.embed:
        state[family.tensor_name("head.weight")] = weights.head
    for index, layer in enumerate(weights.layers):
        for name, parts in layer_parts(config).items():
            rows = [part_shape(config, part)[0] for part in parts]
            views = getattr(layer, name).split(rows)
            state.update({family.tensor_name(part, index): view for part, view in zip(parts, views, strict=True)})
    return state


def load_weights(
    config: DecoderConfig,
    source: TensorSource,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DecoderWeights:
    """Reads the weights of a decoder; at any time only one stored tensor exists beside them.

    Raises UserError that names file and tensor where one is missing, unexpected, of another shape
    than the config says, or not floating-point.
    """
    family = family_of(config)
    weights = empty_weights(config, dtype, device)
    state = to_state_dict(weights, config, family)
    names = match_names(family, source, state, config)
    with torch.no_grad():
        for name, view in state.items():
            view.copy_(source.read(names[name]))
    if config.tie_word_embeddings:
        check_tied_head(family, source, names, weights.embed)
    return weights


def match_names(
    family: Family, source: TensorSource, state: Mapping[str, Tensor], config: DecoderConfig
) -> dict[str, str]:
    """Checkpoint name of every tensor that is needed, after checking that names and shapes agree."""
    shapes = source.shapes()
    names = {meant: name for name in shapes if (meant := family.canonical_name(name)) is not None}
    optional = {family.tensor_name("head.weight")} if config.tie_word_embeddings else set()
    missing = sorted(state.keys() - names.keys())
    if missing:
        raise UserError(f"{source.place()}: missing {_some_names(missing)}")
    unexpected = sorted(names[name] for name in names.keys() - state.keys() - optional)
    if unexpected:
        raise UserError(f"{source.place(unexpected[0])}: unexpected {_some_names(unexpected)} for family {family.name}")
    for name, view in state.items():
        found = shapes[names[name]]
        if found != tuple(view.shape):
            raise UserError(
                f"{source.place(names[name])}: tensor '{names[name]}' has shape {list(found)}, "
                f"the config says {list(view.shape)}"
            )
    return names


def _some_names(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors: {shown}" + ", ..." * (len(names) > 3)


def check_tied_head(family: Family, source: TensorSource, names: Mapping[str, str], embed: Tensor) -> None:
    """A checkpoint may store the head although it is tied; then it must be the embedding."""
    name = names.get(family.tensor_name("head.weight"))
    if name is not None and not torch.equal(source.read(name).to(embed), embed):
        raise UserError(
            f"{source.place(name)}: the config says tie_word_embeddings, but tensor '{name}' differs "
            "from the embedding; set tie_word_embeddings to false"
        )


def save_model(
    folder: Path,
    weights: DecoderWeights,
    config: DecoderConfig,
    extra_files: Mapping[str, bytes] | None = None,
    manifest: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder that transformers and this package read: config.json and one safetensors file.

    The folder appears under its name only when it is complete; `extra_files` (name -> content)
    carries the tokenizer. With `manifest`, the source it states is written beside the checksums of
    all files. Raises UserError where the folder exists and is not empty.
    """
    dtype = str(weights.embed.dtype).removeprefix("torch.")
    fields = {**family_of(config).to_hf(config), "torch_dtype": dtype}
    with publish_folder(folder) as partial:
        state = {name: tensor.contiguous() for name, tensor in to_state_dict(weights, config).items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(0o644)  # written readable by its owner alone
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        for name, content in (extra_files or {}).items():
            (partial / name).write_bytes(content)
        if manifest is not None:
            write_manifest(partial, manifest)
