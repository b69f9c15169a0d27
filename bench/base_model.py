"""The frozen base model of one or many jobs, loaded once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from peftdyno.engine.accounting.predict import Untuned
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.builtin_configs import find_builtin
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.sources import DTYPES, ModelFiles, load_model
from peftdyno.engine.tokenizer import Tokenizer
from peftdyno.kernels import dispatch


@dataclass
class BaseModel:
    """Decoder, tokenizer and what identifies the weights."""

    decoder: Decoder
    tokenizer: Tokenizer
    files: ModelFiles
    dtype: str
    load_seconds: float
    quant: str | None = None
    identity: dict[str, Any] = field(init=False)
    """Origin and, for a folder, the checksums of its weight files."""

    def __post_init__(self) -> None:
        self.identity = dict(self.files.source)
        if self.identity["kind"] == "folder":
            del self.identity["path"]
            self.identity["sha256"] = self.files.checksums()

    @property
    def hub_name(self) -> str:
        """The name under which others find the model: its hub id where it is a built-in one."""
        builtin = find_builtin(self.files.name)
        return self.files.name if builtin is None else builtin.hub_ids[0]

    def untuned(self) -> AdapterBank:
        """The base model as a bank of one run."""
        return AdapterBank.create(self.decoder.config, [Untuned()], [0], self.decoder.weights)

    def describe(self) -> dict[str, Any]:
        """For a run's record."""
        return {
            "name": self.files.name,
            "source": dict(self.files.source),
            "family": self.files.family.name,
            "dtype": self.dtype,
            **({} if self.quant is None else {"quant": self.quant}),
            "device": self.decoder.device.type,
        }


def load_base(name: str, dtype: str = "bf16", device: str = "auto", quant: str | None = None) -> BaseModel:
    """Load a model by name; UserError where it has no tokenizer or the device is not there."""
    start = time.perf_counter()
    place = choose_device(device)
    config, weights, tokenizer, files = load_model(name, DTYPES[dtype], place, quant)
    if tokenizer is None:
        raise UserError(f"model '{name}' has no tokenizer.json; a task needs one")
    decoder = Decoder(config, weights, Scope())
    return BaseModel(decoder, tokenizer, files, dtype, time.perf_counter() - start, quant)


def choose_device(name: str) -> torch.device:
    """The device of a name, a numbered one from here on the current one; UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device '{name}' is not one of auto, cpu, cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; give --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device '{name}' is not one of auto, cpu, cuda")
    if device.index is not None and device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"--device '{name}': PyTorch sees {count} CUDA devices, numbered from 0")
        torch.cuda.set_device(device)  # Triton launches there, and streams and events are made there
    return device


def use_hardware(threads: int | None, kernels: str) -> None:
    """Set the number of CPU threads and the implementation of the operators, for this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        dispatch.use(kernels)
    except ValueError as error:
        raise UserError(str(error)) from error
