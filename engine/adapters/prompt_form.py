"""PEFT's form of learned positions: one tensor `prompt_embeddings` and the fields that all such methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftdyno.engine.config import DecoderConfig

if TYPE_CHECKING:
    from peftdyno.engine.adapters.peft_reader import AdapterFields

EMBEDDINGS = "prompt_embeddings"
"""Name of the one tensor of the adapter's file."""


def prompt_fields(peft_type: str | None, config: DecoderConfig, n: int, *, width: int, heads: int) -> dict[str, Any]:
    """Shared fields for n positions; `width` and `heads` are those of a model row, or of a key for prefixes."""
    return {
        "peft_type": peft_type,
        "num_virtual_tokens": n,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }


def read_prompt_fields(fields: AdapterFields, config: DecoderConfig, *, width: int, heads: int) -> int:
    """Take the shared fields out; the number of positions. UserError where they belong to another model."""
    expected = {
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
    }
    for name, value in expected.items():
        found = fields.size(name, value)
        if found != value:
            raise fields.error(name, found, f"{value}, as this base model has")
    fields.neutral("modules_to_save", None, [])
    return fields.size("num_virtual_tokens")
