"""Adapter folders as PEFT writes and reads them: config, tensors, model card.

A method that PEFT does not have is stored in the same two files: `peft_type` is PEFTDYNO_ and its name, `settings`
its fields, and the tensors have the names of its parameters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftdyno.engine import adapters
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
from peftdyno.engine.atomic import whole_folder
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families.family import Family
from peftdyno.engine.weights import DecoderWeights

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = "0.21.2"
"""The PEFT release whose format is written."""
OWN_PREFIX = "PEFTDYNO_"
BASE = "base_model.model."

ABOUT = ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
"""Fields that say nothing about what the adapter does; PEFT would import what `auto_mapping` names."""


def save_adapter(
    bank: AdapterBank,
    run: int,
    folder: Path,
    base_model_name: str,
    family: Family,
    extra_readme: str | None = None,
) -> None:
    """Write one run's adapter as a folder that appears whole, in place of an older one.

    `extra_readme` is Markdown for the end of the model card.
    """
    method = bank.methods[run]
    fields, tensors = method.to_peft(bank, run, family) if method.peft_type else _own_form(bank, run)
    config = {
        **fields,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "peft_version": FORMAT_VERSION,
    }
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with whole_folder(folder) as target:
        save_file(stored, target / TENSOR_FILE, metadata={"format": "pt"})
        (target / TENSOR_FILE).chmod(0o644)
        (target / CARD_FILE).write_text(model_card(bank, run, base_model_name, extra_readme), encoding="utf-8")
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
        (target / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(folder: Path, config: DecoderConfig, family: Family) -> tuple[Method, dict[str, Tensor]]:
    """The method and the tensors, by our names, of an adapter folder.

    UserError that names file and key for whatever is missing, unknown, unsupported, of a wrong shape or not finite.
    """
    fields = AdapterFields(folder / CONFIG_FILE, _read_config(folder / CONFIG_FILE))
    if fields.take("task_type") != "CAUSAL_LM":
        raise UserError(
            f"{fields.path}: field 'task_type' must be 'CAUSAL_LM'; without it PEFT would ignore some adapters silently"
        )
    for name in ABOUT:
        fields.take(name)
    tensors = AdapterTensors(folder / TENSOR_FILE, _read_tensors(folder / TENSOR_FILE, family))
    cls = _method_of(fields, tensors)
    try:
        if cls.peft_type:
            fields_type = fields.take("peft_type")
            assert fields_type == cls.peft_type, fields_type
            method, values = cls.from_peft(fields, tensors, config, family)
        else:
            method, values = _from_own_form(cls, fields, tensors, config)
    except UserError as error:
        text = str(error)
        raise error if text.startswith(str(folder)) else UserError(f"{fields.path}: {text}") from error
    fields.finish()
    tensors.finish()
    return method, values


def bank_from_adapters(
    folders: Sequence[Path], config: DecoderConfig, weights: DecoderWeights, family: Family
) -> AdapterBank:
    """Several trained adapters of one method as the runs of one bank; settings that matter in training only become
    the first's. UserError where their methods or other settings clash."""
    loaded = [load_adapter(folder, config, family) for folder in folders]
    methods = [method for method, _ in loaded]
    for folder, method in zip(folders, methods, strict=True):
        if method.name != methods[0].name:
            raise UserError(
                f"{folder}: method '{method.name}' cannot share a bank with '{methods[0].name}' of {folders[0]}; "
                "load them apart"
            )
    shared = {name: getattr(methods[0], name) for name in methods[0].training_only}
    methods = [dataclasses.replace(method, **shared) for method in methods]
    return AdapterBank.from_tensors(config, methods, [values for _, values in loaded], weights)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; an adapter folder has {CONFIG_FILE} and {TENSOR_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _read_tensors(path: Path, family: Family) -> dict[str, Tensor]:
    """Every tensor, floating-point and finite, under the names of the plain text model."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; only safetensors are read")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or corrupt safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: tensor '{name}' is {tensor.dtype}, expected floating point")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: tensor '{name}' has NaN or infinite values; train the adapter again")
    return {_canonical(name, family): tensor for name, tensor in tensors.items()}


def _canonical(name: str, family: Family) -> str:
    """An adapter of a model that also reads images names the text decoder's modules differently."""
    if not name.startswith(BASE):
        return name
    found = family.canonical_name(name.removeprefix(BASE))
    return name if found is None else BASE + found


def _method_of(fields: AdapterFields, tensors: AdapterTensors) -> type[Method]:
    found = fields.get("peft_type")
    own = {OWN_PREFIX + name.upper(): cls for name, cls in adapters.METHODS.items() if cls.peft_type is None}
    if found in own:
        return own[found]
    for cls in adapters.METHODS.values():
        if cls.recognises(fields, tensors):
            return cls
    known = {cls.peft_type for cls in adapters.METHODS.values() if cls.peft_type} | own.keys()
    raise UserError(f"{fields.path}: {unknown('peft_type', str(found), known)}")


def _own_form(bank: AdapterBank, run: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method = bank.methods[run]
    settings = {item.name: getattr(method, item.name) for item in dataclasses.fields(method)}
    return {"peft_type": OWN_PREFIX + method.name.upper(), "settings": settings}, bank.run_tensors(run)


def _from_own_form(
    cls: type[Method], fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig
) -> tuple[Method, dict[str, Tensor]]:
    fields.take("peft_type")
    settings = fields.table("settings")
    known = {item.name for item in dataclasses.fields(cls)}
    for name in settings:
        if name not in known:
            raise unknown(f"{cls.name} setting", name, known)
    from pydantic import TypeAdapter, ValidationError  # only here: training needs no pydantic

    try:
        method = TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"setting '{place}' is {first['input']!r}: {first['msg']}") from error
    shapes = method.parameters(config)
    return method, {name: tensors.take(name, *shape) for name, shape in shapes.items()}


def model_card(bank: AdapterBank, run: int, base_model_name: str, extra: str | None) -> str:
    """The adapter's README: Hugging Face's metadata, the method's settings, sizes, and what the caller adds."""
    method, config = bank.methods[run], bank.config
    base = json.dumps(base_model_name)
    trained, stored = method.trainable_count(config), method.stored_count(config)
    settings = {item.name: getattr(method, item.name) for item in dataclasses.fields(method)}
    rows = {**settings, "trained values": f"{trained:,}", "stored values": f"{stored:,}"}
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'peft' if method.peft_type else 'peftdyno'}",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {json.dumps(f'base_model:adapter:{base_model_name}')}",
        f"- {method.name}",
        "- peftdyno",
        "---",
        "",
        f"# {method.name} adapter of {base_model_name}",
        "",
        *_table(rows),
    ]
    return "\n".join(lines) + ("" if extra is None else f"\n\n{extra.strip()}") + "\n"


def _table(rows: Mapping[str, Any]) -> list[str]:
    shown = {name: str(value).replace("|", "\\|") for name, value in rows.items()}
    return ["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())]
