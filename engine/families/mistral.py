"""Mistral 7B: Llama with a sliding window on every layer (version 0.1) or none (later versions)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import hf_config as hf
from peftdyno.engine.families.family import Family


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A null `sliding_window` means full attention; an absent one means 4096, as in transformers."""
    hf.refuse(config, "layer_types", None, "a Mistral model has one kind of attention on all layers")
    theta, scaling = hf.rope(hf.rope_fields(config), 10_000.0)
    has_window = config.get("sliding_window", 4096) is not None
    return DecoderConfig(
        family="mistral",
        **hf.shared_fields(config),
        activation=hf.activation(config),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=hf.size(config, "sliding_window", 4096) if has_window else None,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config of transformers' MistralForCausalLM."""
    if config.attention_bias or config.attention_output_bias:
        raise UserError("a Mistral checkpoint has no place for attention biases")
    fields = hf.shared_to_hf(config, "mistral", "MistralForCausalLM")
    return {**fields, "sliding_window": config.sliding_window}


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
)
