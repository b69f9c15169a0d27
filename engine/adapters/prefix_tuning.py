"""Prefix tuning: learned keys and values before every sequence in each layer (Li and Liang 2021).
y = attention(Q, [P_K; K], [P_V; V]), with P_K and P_V [n, d] of every kv head out of a trained MLP, or trained
themselves (arXiv:2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.encoder import Encoder, affine, uniform_start
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.prompt_form import EMBEDDINGS, prompt_fields, read_prompt_fields
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Root
from peftdyno.engine.weights import DecoderWeights

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
    from peftdyno.engine.families.family import Family


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Encoder):
    """n prefix positions of width 2 L K d: layer by layer a key, then a value, of every kv head. Keys are used as
    they are, without rotation; the sequence's own positions start at n.

    With `projection` they come out of an MLP, n x (K d) -> hidden_size -> 2 L K d with a tanh between, and only its
    output is stored. Without it they are the parameters themselves.
    """

    name: ClassVar[str] = "prefix-tuning"
    learning_rate: ClassVar[float] = 1e-5
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    unmergeable: ClassVar[str] = "keys and values of a prefix are not weights"

    num_virtual_tokens: int = 32
    projection: bool = True
    hidden_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size < 1:
            raise UserError(f"prefix-tuning.hidden_size {self.hidden_size} must be at least 1")

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        n, hidden, width = self.num_virtual_tokens, self.hidden_size, _prefix_width(config)
        if not self.projection:
            return {"embedding.weight": (n, width)}
        return {
            "embedding.weight": (n, config.key_size),
            "transform.0.weight": (hidden, config.key_size),
            "transform.0.bias": (hidden,),
            "transform.2.weight": (width, hidden),
            "transform.2.bias": (width,),
        }

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        if name == "embedding.weight":
            return random.standard_normal(shape, dtype=np.float32)
        layer = weights.layers[0]
        key_size = (layer.qkv.shape[0] - layer.o.shape[1]) // 2
        return uniform_start(random, shape, key_size if name.startswith("transform.0") else self.hidden_size)

    def stored_count(self, config: DecoderConfig) -> int:
        return self.num_virtual_tokens * _prefix_width(config)

    def flat_prefix(self, bank: AdapterBank) -> Tensor:
        """Keys and values of all layers, [R, n, 2 L K d]."""
        p = bank.parameters
        if not self.projection:
            return p["embedding.weight"]
        inner = torch.tanh(affine(p["embedding.weight"], p["transform.0.weight"], p["transform.0.bias"]))
        return affine(inner, p["transform.2.weight"], p["transform.2.bias"])

    def encode(self, bank: AdapterBank) -> tuple[Tensor, ...]:
        config = bank.config
        pairs = 2 * config.num_hidden_layers
        heads = config.num_key_value_heads, config.head_dim
        rows = self.flat_prefix(bank).unflatten(2, (pairs, *heads)).flatten(0, 1)
        return tuple(x.contiguous() for x in rows.unbind(1))

    def root(self) -> Root:
        return Root(kind="keys", length=self.num_virtual_tokens)

    def prefix(self, bank: AdapterBank, layer: int) -> tuple[Tensor, Tensor]:
        leaves = bank.state["leaves"]
        return leaves[2 * layer], leaves[2 * layer + 1]

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = bank.config
        sizes = {"width": config.key_size, "heads": config.num_key_value_heads}
        fields = prompt_fields(self.peft_type, config, self.num_virtual_tokens, **sizes)
        fields |= {"prefix_projection": self.projection, "encoder_hidden_size": self.hidden_size}
        return fields, {EMBEDDINGS: self.flat_prefix(bank)[run].detach()}

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        n = read_prompt_fields(fields, config, width=config.key_size, heads=config.num_key_value_heads)
        fields.flag("prefix_projection")  # what the file holds has been projected
        fields.take("init_weights")
        hidden = fields.size("encoder_hidden_size", cls.hidden_size) if fields.get("encoder_hidden_size") else None
        method = cls(num_virtual_tokens=n, projection=False, hidden_size=hidden or cls.hidden_size)
        return method, {"embedding.weight": tensors.take(EMBEDDINGS, n, _prefix_width(config))}


def _prefix_width(config: DecoderConfig) -> int:
    return 2 * config.num_hidden_layers * config.key_size
