"""P-tuning: virtual tokens out of an encoder, an LSTM with an MLP head or an MLP (Liu et al. 2021, section 3.2).
logits = model([f(P); E x]), with the encoder f and P [n, D] trained, E x the tokens' embeddings (arXiv:2103.10385)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.encoder import Encoder, affine, uniform_start
from peftdyno.engine.adapters.lstm import bidirectional
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.prompt_form import EMBEDDINGS, prompt_fields, read_prompt_fields
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.pack import Root
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.random import keep_mask, threshold

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
    from peftdyno.engine.families.family import Family

EncoderKind = Literal["lstm", "mlp", "none"]
LSTM_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Tensors of one direction of an LSTM layer, as PyTorch names them."""


@dataclass(frozen=True, kw_only=True)
class PTuning(Encoder):
    """n virtual tokens through an encoder of width h = `hidden_size`; only what comes out is stored.

    `lstm`: `num_layers` bidirectional layers with dropout between them, then 2h -> 2h -> D with a ReLU.
    `mlp`: D -> h -> h -> D with ReLUs. `none`: the embeddings themselves, which is what a stored adapter holds.
    """

    name: ClassVar[str] = "p-tuning"
    learning_rate: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "P_TUNING"
    per_run: ClassVar[tuple[str, ...]] = ("dropout",)
    unmergeable: ClassVar[str] = "virtual tokens are not weights"

    num_virtual_tokens: int = 100
    encoder: EncoderKind = "lstm"
    hidden_size: int = 768
    num_layers: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in get_args(EncoderKind):
            raise unknown("p-tuning.encoder", self.encoder, get_args(EncoderKind))
        if self.hidden_size < 1 or self.num_layers < 1:
            raise UserError(f"p-tuning: hidden_size {self.hidden_size}, num_layers {self.num_layers} must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"p-tuning.dropout {self.dropout} must be in [0, 1)")

    def _head_sizes(self, width: int) -> list[int]:
        """Widths of the MLP from its input to the model width."""
        h = self.hidden_size
        return {"lstm": [2 * h, 2 * h, width], "mlp": [width, h, h, width], "none": []}[self.encoder]

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        width, h = config.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.num_virtual_tokens, width)}
        for layer in range(self.num_layers if self.encoder == "lstm" else 0):
            sizes = ((4 * h, width if layer == 0 else 2 * h), (4 * h, h), (4 * h,), (4 * h,))
            for direction in ("", "_reverse"):
                for kind, size in zip(LSTM_KINDS, sizes, strict=True):
                    shapes[f"lstm_head.{kind}_l{layer}{direction}"] = size
        for i, (columns, out) in enumerate(itertools.pairwise(self._head_sizes(width))):
            shapes[f"mlp_head.{2 * i}.weight"] = (out, columns)
            shapes[f"mlp_head.{2 * i}.bias"] = (out,)
        return shapes

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        part, rest = name.split(".", 1)
        if part == "embedding":
            return random.standard_normal(shape, dtype=np.float32)
        if part == "lstm_head":
            return uniform_start(random, shape, self.hidden_size)
        sizes = self._head_sizes(weights.embed.shape[1])
        return uniform_start(random, shape, sizes[int(rest.split(".")[0]) // 2])

    def stored_count(self, config: DecoderConfig) -> int:
        return self.num_virtual_tokens * config.hidden_size

    def unrecordable(self) -> str:
        return "p-tuning's LSTM draws its dropout with keys that the host reads" if self.encoder == "lstm" else ""

    def encode(self, bank: AdapterBank) -> tuple[Tensor]:
        masks = None
        if bank.training and self.encoder == "lstm":
            masks = [self._masks(bank, layer) for layer in range(1, self.num_layers)]
        return (self._encoded(bank.parameters, masks).flatten(0, 1),)

    def _encoded(self, p: Mapping[str, Tensor], masks: Sequence[Tensor] | None) -> Tensor:
        """Embeddings [R, n, D] from stacked parameters; `masks` are what multiplies between LSTM layers."""
        x = p["embedding.weight"]
        for layer in range(self.num_layers if self.encoder == "lstm" else 0):
            if layer and masks is not None:
                x = x * masks[layer - 1]
            x = bidirectional(x, *([p[f"lstm_head.{k}_l{layer}{d}"] for k in LSTM_KINDS] for d in ("", "_reverse")))
        last = len(self._head_sizes(0)) - 2
        for i in range(last + 1):
            x = affine(x, p[f"mlp_head.{2 * i}.weight"], p[f"mlp_head.{2 * i}.bias"])
            x = x if i == last else x.relu()
        return x

    def _masks(self, bank: AdapterBank, layer: int) -> Tensor:
        """Dropout of what enters an LSTM layer, [R, n, 2h], drawn from each run's seed and step."""
        rows = torch.arange(self.num_virtual_tokens, device=bank.flat.device)
        kept = []
        for method, key in zip(bank.methods, bank.keys("dropout.encoder", layer), strict=True):
            assert isinstance(method, PTuning)
            mask = keep_mask(rows, 2 * self.hidden_size, key, method.dropout)
            kept.append(mask / (1 - threshold(method.dropout) / 65536))
        return torch.stack(kept).to(bank.flat.dtype)

    def root(self) -> Root:
        return Root(kind="tokens", length=self.num_virtual_tokens)

    def virtual_embeddings(self, bank: AdapterBank) -> Tensor:
        embeddings: Tensor = bank.state["leaves"][0]
        return embeddings

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, method = bank.config, bank.methods[run]
        assert isinstance(method, PTuning)
        sizes = {"width": config.hidden_size, "heads": config.num_attention_heads}
        fields = prompt_fields(self.peft_type, config, self.num_virtual_tokens, **sizes)
        fields |= {
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.hidden_size,
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": method.dropout,
        }
        stacked = {name: tensor[None] for name, tensor in bank.run_tensors(run).items()}
        return fields, {EMBEDDINGS: self._encoded(stacked, None)[0]}

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        n = read_prompt_fields(fields, config, width=config.hidden_size, heads=config.num_attention_heads)
        kind = fields.take("encoder_reparameterization_type", "MLP")
        if kind not in ("MLP", "LSTM"):
            raise fields.error("encoder_reparameterization_type", kind, "'MLP' or 'LSTM'")
        method = cls(
            num_virtual_tokens=n,
            encoder="none",
            hidden_size=fields.size("encoder_hidden_size", config.hidden_size),
            num_layers=fields.size("encoder_num_layers", cls.num_layers),
            dropout=fields.number("encoder_dropout", 0.0),
        )
        return method, {"embedding.weight": tensors.take(EMBEDDINGS, n, config.hidden_size)}
