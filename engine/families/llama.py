"""Llama 2 and 3, and the models built like them (SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import hf_config as hf
from peftdyno.engine.families.family import Family


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """`attention_bias` puts a bias on all four attention projections."""
    hf.refuse(config, "mlp_bias", False, "biases in the MLP are not supported")
    theta, scaling = hf.rope(hf.rope_fields(config), 10_000.0)
    bias = hf.flag(config, "attention_bias")
    return DecoderConfig(
        family="llama",
        **hf.shared_fields(config),
        activation=hf.activation(config),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=bias,
        attention_output_bias=bias,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config of transformers' LlamaForCausalLM."""
    if config.attention_bias != config.attention_output_bias:
        raise UserError("a Llama checkpoint has biases on all attention projections or on none")
    fields = hf.shared_to_hf(config, "llama", "LlamaForCausalLM")
    return {**fields, "attention_bias": config.attention_bias, "mlp_bias": False}


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
)
