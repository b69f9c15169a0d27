"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and an optional window on upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import hf_config as hf
from peftdyno.engine.families.family import Family


def window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """`use_sliding_window` switches the window on; layers below `max_window_layers` keep full attention."""
    if not hf.flag(config, "use_sliding_window"):
        return {}
    first = config.get("max_window_layers", 28)
    upper = tuple(layer >= first for layer in range(hf.size(config, "num_hidden_layers")))
    layers = hf.window_layers(config, upper)
    return {"sliding_window": hf.size(config, "sliding_window", 4096), "window_layers": layers}


def window_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The three window fields; `layer_types` says which layers."""
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = hf.layer_types(config)
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds),
        "layer_types": kinds,
    }


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Queries, keys and values always have a bias, the output projection never."""
    theta, scaling = hf.rope(hf.rope_fields(config), 10_000.0)
    return DecoderConfig(
        family="qwen2",
        **hf.shared_fields(config),
        **window_fields(config),
        activation=hf.activation(config),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=True,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config of transformers' Qwen2ForCausalLM."""
    if not config.attention_bias or config.attention_output_bias:
        raise UserError("a Qwen2 checkpoint has biases on queries, keys and values, and on nothing else")
    return {**hf.shared_to_hf(config, "qwen2", "Qwen2ForCausalLM"), **window_to_hf(config)}


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    from_hf=from_hf,
    to_hf=to_hf,
)
