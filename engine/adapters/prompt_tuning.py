"""Prompt tuning: learned embeddings of virtual tokens before every sequence (Lester et al. 2021).
logits = model([P; E x]), with P [n, D] trained and E x the tokens' embeddings (arXiv:2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.prompt_form import EMBEDDINGS, prompt_fields, read_prompt_fields
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.pack import Root
from peftdyno.engine.weights import DecoderWeights

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
    from peftdyno.engine.families.family import Family

Init = Literal["vocabulary", "text", "file"]
THEIR_INIT = {"vocabulary": "SAMPLE_VOCAB", "text": "RANDOM", "file": "RANDOM"}
"""PEFT's word for a start; its TEXT asks for a tokenizer, and a stored prompt needs none."""


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """n virtual tokens. They start as embeddings of random vocabulary entries, of a text's tokens `text_ids`
    (repeated or cut to n), or as the `prompt_embeddings` of the safetensors file `init_file`."""

    name: ClassVar[str] = "prompt-tuning"
    learning_rate: ClassVar[float] = 3e-2
    per_run: ClassVar[tuple[str, ...]] = ("init", "text_ids", "init_file")
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    unmergeable: ClassVar[str] = "virtual tokens are not weights"

    num_virtual_tokens: int = 100
    init: Init = "vocabulary"
    text_ids: tuple[int, ...] = ()
    init_file: str = ""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise UserError(f"prompt-tuning.num_virtual_tokens {self.num_virtual_tokens} must be at least 1")
        if self.init not in get_args(Init):
            raise unknown("prompt-tuning.init", self.init, get_args(Init))
        if (self.init == "text") != bool(self.text_ids):
            raise UserError("prompt-tuning: text_ids go with init=text, and init=text needs them")
        if (self.init == "file") != bool(self.init_file):
            raise UserError("prompt-tuning: init_file goes with init=file, and init=file needs it")

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (self.num_virtual_tokens, config.hidden_size)}

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        if self.init == "file":
            return _given(Path(self.init_file), shape)
        size = weights.embed.shape[0]
        if self.init == "vocabulary":
            ids = random.integers(size, size=shape[0])
        else:
            ids = np.resize(np.array(self.text_ids), shape[0])
        if ids.min() < 0 or ids.max() >= size:
            raise UserError(f"prompt-tuning.text_ids must lie in [0, {size}), the model's vocabulary")
        return weights.embed[torch.from_numpy(ids).to(weights.embed.device)].float()

    def derive(self, bank: AdapterBank, weights: DecoderWeights) -> None:
        # Virtual tokens join the stream after the family's scaling, so rows of the vocabulary start scaled.
        bank.buffers["embedding_scale"] = float(torch.tensor(bank.config.embedding_scale, dtype=weights.embed.dtype))

    def start(self, bank: AdapterBank, run: int) -> None:
        if self.init != "file":
            bank.parameters[EMBEDDINGS][run].mul_(bank.buffers["embedding_scale"])

    def root(self) -> Root:
        return Root(kind="tokens", length=self.num_virtual_tokens)

    def virtual_embeddings(self, bank: AdapterBank) -> Tensor:
        return bank.parameters[EMBEDDINGS].flatten(0, 1)

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = bank.config
        sizes = {"width": config.hidden_size, "heads": config.num_attention_heads}
        fields = prompt_fields(self.peft_type, config, self.num_virtual_tokens, **sizes)
        return fields | {"prompt_tuning_init": THEIR_INIT[self.init]}, bank.run_tensors(run)

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        n = read_prompt_fields(fields, config, width=config.hidden_size, heads=config.num_attention_heads)
        for name in ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"):
            fields.take(name)  # they say how training started
        return cls(num_virtual_tokens=n), {EMBEDDINGS: tensors.take(EMBEDDINGS, n, config.hidden_size)}


def _given(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The `prompt_embeddings` of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(EMBEDDINGS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"prompt-tuning.init_file {path} gives no tensor '{EMBEDDINGS}': {error}") from error
    if tensor.shape != shape or not tensor.isfinite().all():
        raise UserError(f"prompt-tuning.init_file {path}: '{EMBEDDINGS}' must be finite, of shape {list(shape)}")
    return tensor.float()
