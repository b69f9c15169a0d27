"""GGUF files: metadata read as a config, tensors dequantised and put back into the Hugging Face layout.

The format keeps the same weights under other names. Three things differ in the numbers: quantised
blocks, query and key rows of Llama models (interleaved for another rotary layout), and Gemma's norm
weights (stored as 1 + w).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import config_from_hf, family_of

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
SITES = {
    "token_embd": "embed",
    "output_norm": "final_norm",
    "output": "head",
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "post_ffw_norm": "mlp_post_norm",
}
"""Name in the file (after ``blk.N.``) -> our site name."""
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """One GGUF file as a source of tensors under Hugging Face names; raises UserError if unreadable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in MODEL_TYPES:
            raise UserError(
                f"{path}: field 'general.architecture' is '{self.architecture}', supported: {', '.join(MODEL_TYPES)}"
            )
        self._raw = {tensor.name: tensor for tensor in self._reader.tensors}
        self._config = self._read_config()
        self._names = {self._hf_name(name): name for name in self._raw if name != ROPE_FACTORS}

    def value(self, name: str, default: Any = None) -> Any:
        """A metadata value, or the default where the file has none."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def config(self) -> DecoderConfig:
        """The decoder's config from the metadata."""
        return self._config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape under its Hugging Face name."""
        return {name: self._shape(raw) for name, raw in self._names.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised to float32, with rows and offsets as Hugging Face has them."""
        from gguf.quants import dequantize

        raw = self._raw[self._names[name]]
        try:
            values = dequantize(raw.data, raw.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor '{raw.name}' has type {raw.tensor_type.name}, not supported"
            ) from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self._shape(raw.name))
        return self._restore(raw.name, tensor)

    def place(self, name: str | None = None) -> str:
        """The file, for messages."""
        return str(self.path)

    def _shape(self, raw_name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._raw[raw_name].shape))

    def _restore(self, raw_name: str, tensor: Tensor) -> Tensor:
        """Undoes what the converter did to the values."""
        site = raw_name.split(".")[-2]
        if self.architecture == "llama" and site in ("attn_q", "attn_k"):
            config = self._config
            heads = config.num_attention_heads if site == "attn_q" else config.num_key_value_heads
            # The file interleaves the two halves that the rotary embedding pairs up.
            pairs = tensor.reshape(heads, config.head_dim // 2, 2, -1)
            return pairs.transpose(1, 2).reshape(tensor.shape)
        if self.architecture == "gemma3" and site.endswith("norm"):
            return tensor - 1.0
        return tensor

    def _hf_name(self, raw_name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", raw_name)
        family = family_of(self._config)
        site = SITES.get(match[2]) if match else None
        if match is None or site not in family.names:
            return raw_name
        return family.tensor_name(f"{site}.{match[3]}", int(match[1] or 0))

    def _read_config(self) -> DecoderConfig:
        try:
            return config_from_hf(self._hf_fields())
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def _hf_fields(self) -> dict[str, Any]:
        """The metadata under the names of a Hugging Face config."""
        arch = self.architecture
        if self.value(f"{arch}.expert_count", 0):
            raise UserError("mixtures of experts are not supported")
        if "token_embd.weight" not in self._raw:
            raise UserError("missing tensor 'token_embd.weight'")
        heads = self.value(f"{arch}.attention.head_count")
        fields = {
            "model_type": MODEL_TYPES[arch],
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": self.value(f"{arch}.embedding_length"),
            "intermediate_size": self.value(f"{arch}.feed_forward_length"),
            "num_hidden_layers": self.value(f"{arch}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.value(f"{arch}.attention.head_count_kv", heads),
            "head_dim": self.value(f"{arch}.attention.key_length"),
            "rms_norm_eps": _shortest(self.value(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)),
            "max_position_embeddings": self.value(f"{arch}.context_length"),
            "rope_theta": _shortest(self.value(f"{arch}.rope.freq_base", 10_000.0)),
            "rope_scaling": self._rope_scaling(),
            "tie_word_embeddings": "output.weight" not in self._raw,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
        }
        if arch == "llama":
            fields["attention_bias"] = "blk.0.attn_q.bias" in self._raw
        if arch == "gemma3":
            fields["sliding_window"] = self.value("gemma3.attention.sliding_window")
            fields["query_pre_attn_scalar"] = fields["head_dim"]
            fields["final_logit_softcapping"] = self.value("gemma3.final_logit_softcapping")
        return fields

    def _rope_scaling(self) -> dict[str, Any] | None:
        """Linear scaling is in the metadata, Llama 3's only as a tensor of one factor a frequency."""
        arch = self.architecture
        if ROPE_FACTORS in self._raw:
            return self._llama3_scaling()
        kind = self.value(f"{arch}.rope.scaling.type", "none")
        if kind == "none":
            return None
        return {"rope_type": kind, "factor": self.value(f"{arch}.rope.scaling.factor")}

    def _llama3_scaling(self) -> dict[str, Any]:
        """The published settings with which Llama 3.1's formula gives the stored factors."""
        stored = np.array(self._raw[ROPE_FACTORS].data, dtype=np.float64).ravel()
        theta = float(self.value(f"{self.architecture}.rope.freq_base", 10_000.0))
        scaling = {"factor": float(stored.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        context = 8192
        expected = [_llama3_factor(theta ** (index / len(stored)), context, **scaling) for index in range(len(stored))]
        if not np.allclose(stored, expected, rtol=1e-4):
            raise UserError(f"tensor '{ROPE_FACTORS}' does not follow Llama 3.1's published scaling")
        return {"rope_type": "llama3", "original_max_position_embeddings": context, **scaling}


def _llama3_factor(
    period: float, context: int, factor: float, low_freq_factor: float, high_freq_factor: float
) -> float:
    """What a frequency of 1/period is divided by (Llama 3.1's reference code)."""
    turns = context / (2 * math.pi * period)
    if turns > high_freq_factor:
        return 1.0
    if turns < low_freq_factor:
        return factor
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _shortest(value: float) -> float:
    """The decimal number that was meant: the file keeps only single precision."""
    return float(f"{value:.7g}")


def _open(path: Path) -> Any:
    """A reader over the whole file, after checking that every tensor lies within it."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF files needs the gguf package: pip install 'peftdyno[hf]'") from error
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader raises whatever its arithmetic runs into on damaged files
        raise UserError(f"{path}: truncated or corrupt GGUF file ({error}); fetch it again") from error
