"""Sizes of what is measured: the shape of Llama 3 8B at 8192 tokens, and a tiny one that runs in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftdyno.engine.builtin_configs import LLAMA_3_8B
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families import config_from_hf


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of short runs, shaped as PEFT-Bench's (arXiv:2511.21285): every method on every task with every seed."""

    methods: tuple[str, ...]
    tasks: tuple[tuple[int, int, int], ...]
    """Of each task: tokens of the instruction that all its rows begin with, tokens of the shortest and longest row."""
    seeds: int
    alone: int
    """Seeds that are also trained one after another; one takes as long as another."""
    batch: int
    steps: int
    warm_up: int
    """First steps of a training, off the clock: kernels are compiled, and recordings made."""
    rows: int
    """Examples of a task."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A decoder's config in transformers' names, and what a step is made of."""

    fields: Mapping[str, Any]
    sequences: int
    length: int
    rank: int
    runs: int
    labels_checked: int
    """Labels of a check against float64; the microbenchmark takes all tokens."""
    prompts: tuple[int, int, int]
    """Classification: sequences of a batch, shared tokens, own tokens."""
    new_tokens: int
    pointwise_tokens: tuple[int, ...]
    """Tokens at which norms, activations and rotary embeddings are timed besides."""
    grid: Grid
    layers_of_hf: int
    """Layers of the model built by transformers for comparison."""
    losses: tuple[int, int, int]
    """Comparison of losses with PEFT: layers, tokens of a sequence, steps."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.length

    def config(self, layers: int | None = None) -> DecoderConfig:
        """The decoder, with fewer layers where asked."""
        fields = dict(self.fields)
        if layers is not None:
            fields["num_hidden_layers"] = layers
        return config_from_hf(fields)


FULL = Sizes(
    fields=LLAMA_3_8B,
    sequences=2,
    length=4096,
    rank=16,
    runs=8,
    labels_checked=512,
    prompts=(64, 400, 100),
    new_tokens=128,
    pointwise_tokens=(512, 2048, 32768),
    grid=Grid(
        methods=("lora", "ia3", "prompt-tuning"),
        tasks=((30, 60, 120), (40, 100, 200)),
        seeds=5,
        alone=1,
        batch=4,
        steps=80,
        warm_up=16,
        rows=64,
    ),
    layers_of_hf=32,
    losses=(4, 1024, 50),
)
TINY = Sizes(
    fields={
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    sequences=2,
    length=20,
    rank=4,
    runs=2,
    labels_checked=9,
    prompts=(2, 6, 4),
    new_tokens=2,
    pointwise_tokens=(7,),
    grid=Grid(methods=("ia3",), tasks=((2, 4, 6), (2, 5, 8)), seeds=2, alone=1, batch=2, steps=2, warm_up=1, rows=4),
    layers_of_hf=1,
    losses=(1, 12, 3),
)
