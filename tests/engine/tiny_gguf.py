"""Small GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families import config_from_hf, family_of
from peftdyno.engine.gguf_file import SITES
from peftdyno.engine.weight_files import to_state_dict
from peftdyno.engine.weights import DecoderWeights

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ", "o r"]
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *BYTES,
    *(merge.replace(" ", "") for merge in MERGES),
]


def tiny_config(family: str, **fields: Any) -> DecoderConfig:
    """A config whose widths are multiples of the 32 values that quantised blocks hold."""
    shape = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7 if family == "gemma3_text" else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    }
    if family != "gemma3_text":
        del shape["query_pre_attn_scalar"], shape["sliding_window"]
    return config_from_hf({"model_type": family, **shape, **fields})


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order in which llama.cpp's rotary embedding pairs them for Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def stored_values(name: str, values: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """What the converter writes for a tensor."""
    if config.family == "llama" and "attn_q." in name:
        return interleaved(values, config.num_attention_heads)
    if config.family == "llama" and "attn_k." in name:
        return interleaved(values, config.num_key_value_heads)
    return values + 1 if config.family == "gemma3" and "norm" in name else values


def raw_names(config: DecoderConfig) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    family = family_of(config)
    names = {}
    for raw, site in SITES.items():
        if site not in family.names:
            continue
        for kind in ("weight", "bias"):
            layers = range(config.num_hidden_layers) if "{layer}" in family.names[site] else [None]
            for layer in layers:
                prefix = "" if layer is None else f"blk.{layer}."
                names[family.tensor_name(f"{site}.{kind}", layer or 0)] = f"{prefix}{raw}.{kind}"
    return names


def write_gguf(
    path: Path,
    weights: DecoderWeights,
    config: DecoderConfig,
    *,
    kind: Kind = Kind.F32,
    splitter: str = "smollm",
    extra_tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model with a byte-level BPE tokenizer; `kind` is the type of the linear weights."""
    writer = gguf.GGUFWriter(path, config.family)
    add_metadata(writer, config, splitter)
    names = raw_names(config)
    for name, tensor in to_state_dict(weights, config).items():
        values = np.ascontiguousarray(stored_values(names[name], tensor.numpy(), config))
        if values.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(names[name], gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], values)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: gguf.GGUFWriter, config: DecoderConfig, splitter: str) -> None:
    """Shape and tokenizer under llama.cpp's keys."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
