"""Base weights of a decoder: their structure, shapes and counts, and random or empty ones.

Shape letters: V vocabulary, D model width, Q all query heads together, K all key heads together,
F MLP width. Linear weights are [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.kernels.nf4 import NestedAbsmax, Nf4Weight, Weight

PARTS: dict[str, tuple[str, ...]] = {
    "input_norm": ("input_norm.weight",),
    "qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "o": ("o_proj.weight",),
    "mlp_norm": ("mlp_norm.weight",),
    "gate_up": ("gate_proj.weight", "up_proj.weight"),
    "down": ("down_proj.weight",),
    "qkv_bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    "o_bias": ("o_proj.bias",),
    "q_norm": ("q_norm.weight",),
    "k_norm": ("k_norm.weight",),
    "attention_post_norm": ("attention_post_norm.weight",),
    "mlp_post_norm": ("mlp_post_norm.weight",),
}
"""Field of `LayerWeights` -> the checkpoint tensors whose rows it holds, in order."""


@dataclass
class LayerWeights:
    """Frozen base weights of one layer; query, key and value rows are fused, and so are gate and up. Those of the
    linear products may be in 4 bits."""

    input_norm: Tensor  # [D] before attention
    qkv: Weight  # [Q + 2K, D]
    o: Weight  # [D, Q]
    mlp_norm: Tensor  # [D] before the MLP
    gate_up: Weight  # [2F, D]
    down: Weight  # [D, F]
    qkv_bias: Tensor | None = None  # [Q + 2K]
    o_bias: Tensor | None = None  # [D]
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]
    attention_post_norm: Tensor | None = None  # [D] on the attention output, before the residual addition
    mlp_post_norm: Tensor | None = None  # [D] on the MLP output, before the residual addition


@dataclass
class DecoderWeights:
    """Frozen base weights of a decoder; `head` is the same object as `embed` where they are tied."""

    embed: Tensor  # [V, D]
    layers: list[LayerWeights]
    final_norm: Tensor  # [D]
    head: Tensor  # [V, D]

    def tensors(self) -> list[Tensor]:
        """Every distinct tensor once."""
        found = [self.embed, self.final_norm]
        for layer in self.layers:
            for field in fields(layer):
                weight: Weight | None = getattr(layer, field.name)
                if weight is not None:
                    found += weight.tensors() if isinstance(weight, Nf4Weight) else [weight]
        return found if self.head is self.embed else [*found, self.head]

    def num_bytes(self) -> int:
        """Bytes of all distinct tensors as they are stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def quantisation(self) -> str | None:
        """How the linear weights are quantised, as `--quant` names it; None where they are dense."""
        first = self.layers[0].qkv
        if isinstance(first, Tensor):
            return None
        return "nf4-double" if isinstance(first.absmax, NestedAbsmax) else "nf4"

    def require_dense(self, action: str) -> None:
        """UserError where the weights are in 4 bits, for an action that needs them as they are."""
        if self.quantisation is not None:
            raise UserError(
                f"cannot {action} weights in 4 bits; dequantise them, or load the model without quantisation"
            )


def has_field(config: DecoderConfig, name: str) -> bool:
    """Whether layers of this config have the given field of `LayerWeights`."""
    optional = {
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_output_bias,
        "q_norm": config.query_key_norm,
        "k_norm": config.query_key_norm,
        "attention_post_norm": config.post_norms,
        "mlp_post_norm": config.post_norms,
    }
    return optional.get(name, True)


def layer_parts(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The rows of `PARTS` that layers of this config have."""
    return {name: parts for name, parts in PARTS.items() if has_field(config, name)}


def part_shape(config: DecoderConfig, part: str) -> tuple[int, ...]:
    """Shape of one checkpoint tensor of a layer, given as ``q_proj.weight``."""
    site, kind = part.rsplit(".", 1)
    if site in ("q_norm", "k_norm"):
        return (config.head_dim,)
    if site.endswith("norm"):
        return (config.hidden_size,)
    shape = config.linear_shape(site)
    return shape if kind == "weight" else shape[:1]


def field_shape(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """Shape of one field of `LayerWeights`: its parts stacked along the rows."""
    shapes = [part_shape(config, part) for part in PARTS[name]]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def empty_weights(
    config: DecoderConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta"
) -> DecoderWeights:
    """Weights of the right shapes with unset values; on ``meta`` they take no memory."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    table = (config.vocab_size, config.hidden_size)
    embed = empty(*table)
    layers = [
        LayerWeights(**{name: empty(*field_shape(config, name)) for name in layer_parts(config)})
        for _ in range(config.num_hidden_layers)
    ]
    head = embed if config.tie_word_embeddings else empty(*table)
    return DecoderWeights(embed=embed, layers=layers, final_norm=empty(config.hidden_size), head=head)


def random_weights(
    config: DecoderConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> DecoderWeights:
    """Random weights: linears and embeddings of variance 1/in, effective norm weights around one."""
    weights = empty_weights(config, dtype, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for tensor in (weights.embed, weights.head):
        tensor.normal_(0.0, config.hidden_size**-0.5, generator=generator)
    weights.final_norm.normal_(1.0 - config.norm_offset, 0.1, generator=generator)
    for layer in weights.layers:
        for name in layer_parts(config):
            tensor = getattr(layer, name)
            if name.endswith("norm"):
                tensor.normal_(1.0 - config.norm_offset, 0.1, generator=generator)
            else:
                tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
    return weights


def parameter_count(config: DecoderConfig) -> int:
    """Number of distinct base parameters; a tied head counts once."""
    return sum(tensor.numel() for tensor in empty_weights(config).tensors())
