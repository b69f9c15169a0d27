"""Gemma 3, the text decoder: alone, or as the `text_config` of a model that also reads images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftdyno.engine.config import DecoderConfig, RopeScaling
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import hf_config as hf
from peftdyno.engine.families.family import LLAMA_NAMES, Family

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""Published `text_config` tables leave out what equals transformers' defaults."""


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's fields; tokens ids and tying may stand beside `text_config`."""
    if config.get("model_type") != "gemma3":
        return {**DEFAULTS, **config}
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError("field 'text_config' is missing, expected a table")
    outer = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    return {**DEFAULTS, **outer, **text}


def rope_pair(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """Base and scaling of the global layers, and base of the local ones."""
    found = config.get("rope_parameters")
    if found is None:
        local = hf.number(config, "rope_local_base_freq", 10_000.0)
        return *hf.rope(hf.rope_fields(config), 1_000_000.0), local
    theta, scaling = hf.rope(found.get("full_attention") or {}, 1_000_000.0)
    local, local_scaling = hf.rope(found.get("sliding_attention") or {}, 10_000.0)
    if local_scaling is not None:
        raise UserError("field 'rope_parameters.sliding_attention' scales the local layers: not supported")
    return theta, scaling, local


def local_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Five local layers to one global, unless `layer_types` or the pattern says otherwise."""
    pattern = hf.size(config, "sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    layers = range(1, hf.size(config, "num_hidden_layers") + 1)
    return hf.window_layers(config, tuple(layer % pattern != 0 for layer in layers))


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Embeddings are multiplied by sqrt(hidden_size); norms multiply by 1 + w."""
    config = text_fields(config)
    hf.refuse(config, "use_bidirectional_attention", False, "attention is causal here")
    theta, scaling, local_theta = rope_pair(config)
    bias = hf.flag(config, "attention_bias")
    shared = hf.shared_fields(config, tied=True)
    return DecoderConfig(
        family="gemma3",
        **shared,
        activation=hf.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        attention_bias=bias,
        attention_output_bias=bias,
        query_key_norm=True,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=shared["hidden_size"] ** 0.5,
        attention_scale=hf.number(config, "query_pre_attn_scalar") ** -0.5,
        sliding_window=hf.size(config, "sliding_window"),
        window_layers=local_layers(config),
        attention_softcap=hf.optional_number(config, "attn_logit_softcapping"),
        logit_softcap=hf.optional_number(config, "final_logit_softcapping"),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config of transformers' Gemma3ForCausalLM."""
    if config.attention_bias != config.attention_output_bias:
        raise UserError("a Gemma 3 checkpoint has biases on all attention projections or on none")
    fields = hf.shared_to_hf(config, "gemma3_text", "Gemma3ForCausalLM")
    activation = fields.pop("hidden_act")
    scalar = config.softmax_scale**-2
    return {
        **fields,
        "hidden_activation": activation,
        "rope_local_base_freq": config.rope_local_theta,
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": hf.layer_types(config),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    from_hf=from_hf,
    to_hf=to_hf,
    names={
        **LLAMA_NAMES,
        "q_norm": "model.layers.{layer}.self_attn.q_norm",
        "k_norm": "model.layers.{layer}.self_attn.k_norm",
        "attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
        "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
        "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
    },
    prefixes=(
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
