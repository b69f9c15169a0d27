"""Qwen 3: Llama with an RMS norm on each head of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import hf_config as hf
from peftdyno.engine.families.family import LLAMA_NAMES, Family
from peftdyno.engine.families.qwen2 import window_fields, window_to_hf


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The head size is 128 unless the config says otherwise, whatever the width of the model."""
    theta, scaling = hf.rope(hf.rope_fields(config), 10_000.0)
    bias = hf.flag(config, "attention_bias")
    shared = hf.shared_fields({"head_dim": 128, **config})
    return DecoderConfig(
        family="qwen3",
        **shared,
        **window_fields(config),
        activation=hf.activation(config),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=bias,
        attention_output_bias=bias,
        query_key_norm=True,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config of transformers' Qwen3ForCausalLM."""
    if config.attention_bias != config.attention_output_bias:
        raise UserError("a Qwen3 checkpoint has biases on all attention projections or on none")
    fields = hf.shared_to_hf(config, "qwen3", "Qwen3ForCausalLM")
    return {**fields, **window_to_hf(config), "attention_bias": config.attention_bias}


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
    names={
        **LLAMA_NAMES,
        "q_norm": "model.layers.{layer}.self_attn.q_norm",
        "k_norm": "model.layers.{layer}.self_attn.k_norm",
    },
)
