"""DecoderConfig: the row of flags that makes one forward pass into a Llama, Mistral, Qwen or Gemma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of the rotary embedding.

    `llama3` stretches low frequencies by `factor` and blends between the two wave length limits
    (Llama 3.1 reference code); `linear` divides every frequency by `factor`.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and flags of a decoder; every family is one of these, and the forward pass knows no other."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Scales the layers that `rope_theta` serves: all of them, or the global ones beside a local base."""
    rope_local_theta: float | None = None
    """Base of the rotary embedding on sliding-window layers, where it differs (Gemma 3)."""
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    activation: Activation = "silu"
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_output_bias: bool = False
    query_key_norm: bool = False
    """RMS norm on each head of queries and keys before the rotary embedding (Qwen 3, Gemma 3)."""
    norm_offset: float = 0.0
    """Added to every norm weight: 1 where the checkpoint stores w and the model uses 1 + w (Gemma)."""
    post_norms: bool = False
    """Norms after attention and after the MLP, before each residual addition (Gemma)."""
    embedding_scale: float = 1.0
    """Multiplies embeddings, after the factor itself was rounded to the dtype of the weights (Gemma)."""
    attention_scale: float | None = None
    """Multiplies q k^T; None means head_dim ** -0.5."""
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    """Which layers use the sliding window; empty means all do, where there is a window."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.window_layers and len(self.window_layers) != self.num_hidden_layers:
            raise ValueError(f"window_layers has {len(self.window_layers)} entries for {self.num_hidden_layers} layers")

    @property
    def query_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Columns of all key heads (equally of all value heads) together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor on q k^T."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens (a token sees itself and window - 1 before it), or None."""
        if self.sliding_window is None or (self.window_layers and not self.window_layers[layer]):
            return None
        return self.sliding_window

    def linear_shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a named projection of one layer, e.g. ``k_proj``."""
        d, f, q, k = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        shapes = {
            "q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
        }  # fmt: skip
        if module not in shapes:
            from peftdyno.engine.errors import unknown

            raise unknown("module", module, shapes)
        return shapes[module]
