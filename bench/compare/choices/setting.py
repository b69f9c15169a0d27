"""What a subject is measured on: a model, texts, how many rounds, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.sources import resolve_config


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the measured work is. Shapes of weights are the model's."""

    batch: int = 4
    length: int = 128
    """Sequences of a step and tokens of each."""
    few_rows: int = 16
    """Rows of a product in decoding, and sequences that are decoded together."""
    copies: int = 30
    """Different weights that a product goes through, as many as the model has layers."""
    decode_steps: int = 12
    layers: int = 10
    way_batch: int = 8
    way_lengths: tuple[int, int] = (256, 32)
    """Layers and batches where ways to save memory are compared."""
    stream_bytes: int = 1 << 28
    noise_batches: int = 30
    task_batches: int = 8
    """Batches of labelled texts where steps of a task are compared."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`model` is a folder, `texts` are labelled rows, `prompts` tokens to continue."""

    model: str
    texts: list[dict[str, Any]]
    prompts: list[list[int]]
    repeats: int
    sizes: Sizes = field(default_factory=Sizes)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Setting:
        """A setting out of JSON."""
        sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in found["sizes"].items()}
        return cls(**{**found, "sizes": Sizes(**sizes)})

    @property
    def config(self) -> DecoderConfig:
        """The model's."""
        return resolve_config(self.model)
