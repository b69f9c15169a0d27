"""Shapes of well-known models by name, so that costs can be predicted without their weights.

The values are those of the models' published config.json files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families import config_from_hf


@dataclass(frozen=True, kw_only=True)
class BuiltinConfig:
    """One published shape: the hub ids that have it (the first is where its weights are taken from)."""

    hub_ids: tuple[str, ...]
    short_names: tuple[str, ...]
    fields: Mapping[str, Any]


LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
LLAMA_32_1B = {
    **LLAMA_3_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL_7B_V02 = {**MISTRAL_7B, "rope_theta": 1000000.0, "sliding_window": None}
MISTRAL_7B_V03 = {**MISTRAL_7B_V02, "vocab_size": 32768}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}
QWEN3_1_7B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

BUILTIN_CONFIGS = (
    BuiltinConfig(
        hub_ids=(
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "meta-llama/Meta-Llama-3-8B",
            "meta-llama/Llama-3-8B-Instruct",
            "meta-llama/Llama-3-8B",
        ),
        short_names=("llama-3-8b", "llama-3-8b-instruct", "meta-llama-3-8b", "meta-llama-3-8b-instruct"),
        fields=LLAMA_3_8B,
    ),
    BuiltinConfig(
        hub_ids=("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        short_names=("llama-3.2-1b", "llama-3.2-1b-instruct"),
        fields=LLAMA_32_1B,
    ),
    BuiltinConfig(
        hub_ids=("mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-v0.1"),
        short_names=("mistral-7b-v0.1", "mistral-7b-instruct-v0.1"),
        fields=MISTRAL_7B,
    ),
    BuiltinConfig(
        hub_ids=("mistralai/Mistral-7B-Instruct-v0.2",),
        short_names=("mistral-7b-v0.2", "mistral-7b-instruct-v0.2"),
        fields=MISTRAL_7B_V02,
    ),
    BuiltinConfig(
        hub_ids=("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        short_names=("mistral-7b", "mistral-7b-instruct", "mistral-7b-v0.3", "mistral-7b-instruct-v0.3"),
        fields=MISTRAL_7B_V03,
    ),
    BuiltinConfig(
        hub_ids=("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        short_names=("gemma-3-1b", "gemma-3-1b-it", "gemma-3-1b-pt"),
        fields=GEMMA_3_1B,
    ),
    BuiltinConfig(
        hub_ids=("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"),
        short_names=("qwen3-1.7b", "qwen3-1.7b-base"),
        fields=QWEN3_1_7B,
    ),
    BuiltinConfig(
        hub_ids=("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
        short_names=("smollm2-135m", "smollm2-135m-instruct"),
        fields=SMOLLM2_135M,
    ),
)


def builtin_names() -> dict[str, BuiltinConfig]:
    """Every name that is understood, as it is shown to users."""
    return {name: entry for entry in BUILTIN_CONFIGS for name in (*entry.short_names, *entry.hub_ids)}


def find_builtin(name: str) -> BuiltinConfig | None:
    """The published shape with this short name or hub id, upper and lower case alike; None if unknown."""
    by_name = {known.lower(): entry for known, entry in builtin_names().items()}
    return by_name.get(name.lower())


def builtin_config(name: str) -> DecoderConfig | None:
    """The config of a published shape, or None."""
    entry = find_builtin(name)
    return None if entry is None else config_from_hf(entry.fields)
