"""Small random-weight transformers models, one for each variant that the decoder must match."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 131
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}, "head_dim": 32},
    ),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "num_hidden_layers": 4, "sliding_window": 5}),
    "gemma3-softcap": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
}
"""Variant -> transformers class prefix and the config fields on top of `SHAPE`."""


def tiny_config(variant: str) -> Any:
    """The transformers config of a variant; Gemma alternates local and global layers."""
    import transformers

    prefix, fields = VARIANTS[variant]
    fields = {**SHAPE, **fields}
    if prefix == "Gemma3Text":
        kinds = ("sliding_attention", "full_attention")
        fields["layer_types"] = [kinds[layer % 2] for layer in range(fields["num_hidden_layers"])]
    return getattr(transformers, f"{prefix}Config")(**fields)


def tiny_hf_model(variant: str, folder: Path, seed: int = 0) -> tuple[Any, Path]:
    """A float32 transformers model in eval mode with no weight at its default, saved below `folder`.

    Norm weights and biases are random, so that one left out or put in the wrong place shows.
    Attention is the eager one, which alone applies soft-capping.
    """
    import transformers

    config = tiny_config(variant)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, VARIANTS[variant][0].removesuffix("Text") + "ForCausalLM")(config).float().eval()
    norm_mean = 0.0 if variant.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(norm_mean, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    if softcap := getattr(config, "attn_logit_softcapping", None):
        # Gemma3Attention holds this field but does not hand it on to the attention function, which takes it.
        model.forward = partial(model.forward, softcap=softcap)
    target = folder / variant
    model.save_pretrained(target)
    return model, target
