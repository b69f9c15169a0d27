"""Reading and writing the fields that Hugging Face configs of all families share.

Every function names the field that it does not understand: a setting is honoured or refused, never
passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from peftdyno.engine.config import Activation, DecoderConfig, RopeScaling
from peftdyno.engine.errors import UserError

HFConfig = Mapping[str, Any]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
WINDOWED = {"full_attention": False, "sliding_attention": True}


def size(config: HFConfig, name: str, default: int | None = None) -> int:
    """A positive integer field; without a default it is required."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"field '{name}' {found}, expected a positive integer")
    return value


def number(config: HFConfig, name: str, default: float | None = None) -> float:
    """A positive real field; without a default it is required."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        found = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"field '{name}' {found}, expected a positive number")
    return float(value)


def optional_number(config: HFConfig, name: str) -> float | None:
    """A positive real field that may be absent or null."""
    return None if config.get(name) is None else number(config, name)


def flag(config: HFConfig, name: str, default: bool = False) -> bool:
    """A boolean field."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"field '{name}' is {value!r}, expected true or false")
    return value


def refuse(config: HFConfig, name: str, harmless: Any, why: str) -> None:
    """Raises unless the field is absent, null, or has the value that changes nothing."""
    value = config.get(name)
    if value is not None and value != harmless:
        raise UserError(f"field '{name}' is {value!r}: {why}")


def activation(config: HFConfig, name: str = "hidden_act", default: str = "silu") -> Activation:
    """The gate's activation function."""
    found = config.get(name) or default
    if found not in ACTIVATIONS:
        raise UserError(f"field '{name}' is {found!r}, supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[found]


def eos_ids(config: HFConfig) -> tuple[int, ...]:
    """End-of-turn tokens, which a config gives as one number, a list, or not at all."""
    found = config.get("eos_token_id")
    values = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(value, int) for value in values):
        raise UserError(f"field 'eos_token_id' is {found!r}, expected integers")
    return tuple(values)


def rope_fields(config: HFConfig) -> dict[str, Any]:
    """The rotary settings as one table, from `rope_parameters` or the older `rope_scaling`."""
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise UserError(f"field '{name}' is {found!r}, expected a table")
    return {"rope_theta": config.get("rope_theta"), **(found or {})}


def rope(fields: HFConfig, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and frequency scaling of the rotary embedding, from a table as `rope_fields` returns it."""
    kind = fields.get("rope_type", fields.get("type")) or "default"
    theta = number(fields, "rope_theta", default_theta)
    refuse(fields, "partial_rotary_factor", 1.0, "rotating only some of the columns is not supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=number(fields, "factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=number(fields, "factor"),
            low_freq_factor=number(fields, "low_freq_factor"),
            high_freq_factor=number(fields, "high_freq_factor"),
            original_max_position_embeddings=size(fields, "original_max_position_embeddings"),
        )
    raise UserError(f"field 'rope_type' is {kind!r}, supported: default, linear, llama3")


def window_layers(config: HFConfig, fallback: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which layers slide, from `layer_types` where the config has it."""
    kinds = config.get("layer_types")
    if kinds is None:
        return fallback
    for kind in kinds:
        if kind not in WINDOWED:
            raise UserError(f"field 'layer_types' has {kind!r}, supported: {', '.join(WINDOWED)}")
    return tuple(WINDOWED[kind] for kind in kinds)


def shared_fields(config: HFConfig, *, tied: bool = False) -> dict[str, Any]:
    """Arguments of `DecoderConfig` that every family reads alike; `tied` is the family's default."""
    refuse(config, "quantization_config", None, "quantised checkpoints are not read, take the original")
    refuse(config, "partial_rotary_factor", 1.0, "rotating only some of the columns is not supported")
    heads = size(config, "num_attention_heads")
    hidden = size(config, "hidden_size")
    return {
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": size(config, "intermediate_size"),
        "num_hidden_layers": size(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": size(config, "num_key_value_heads", heads),
        "head_dim": size(config, "head_dim", hidden // heads),
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "max_position_embeddings": size(config, "max_position_embeddings"),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", tied),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": eos_ids(config),
    }


def rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The `rope_scaling` table, which every version of transformers reads."""
    if scaling is None:
        return None
    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        table["low_freq_factor"] = scaling.low_freq_factor
        table["high_freq_factor"] = scaling.high_freq_factor
        table["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return table


def shared_to_hf(config: DecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields of a Hugging Face config that every family writes alike."""
    eos = list(config.eos_token_ids)
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling_to_hf(config.rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    return fields


def layer_types(config: DecoderConfig) -> list[str]:
    """Kind of attention of every layer in the words of Hugging Face."""
    kinds: tuple[Literal["full_attention"], Literal["sliding_attention"]] = (
        "full_attention",
        "sliding_attention",
    )
    return [kinds[config.window(layer) is not None] for layer in range(config.num_hidden_layers)]
