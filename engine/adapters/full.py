"""Full fine-tuning: every weight of the model is trained; the reference that parameter-efficient methods aim at.
y = (W + dW) x, with dW as large as W and free, for every tensor (Hu et al. 2021, equation 1; arXiv:2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.weights import DecoderWeights, field_shape, layer_parts
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.nf4 import Weight
from peftdyno.kernels.picked_rows import picked_rows

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Each run trains a copy of all base weights, under the names of `DecoderWeights`; a tied head is the embedding.

    A token meets the weights of its run alone, in plain PyTorch run by run: written to be right, not to be fast.
    """

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 1e-5

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        table = (config.vocab_size, config.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"embed": table}
        for layer in range(config.num_hidden_layers):
            shapes |= {f"layers.{layer}.{name}": field_shape(config, name) for name in layer_parts(config)}
        shapes["final_norm"] = (config.hidden_size,)
        return shapes if config.tie_word_embeddings else shapes | {"head": table}

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        return base_tensor(weights, name)

    def product(
        self,
        bank: AdapterBank,
        layer: int,
        site: str,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        runs: TokenRuns,
    ) -> Tensor:
        weights = _of_runs(bank, f"layers.{layer}.{site}", x.dtype)
        biases = [None] * bank.num_runs if bias is None else _of_runs(bank, f"layers.{layer}.{site}_bias", x.dtype)
        return torch.cat([linear(*piece) for piece in zip(runs.split(x), weights, biases, strict=True)])

    def embed(self, bank: AdapterBank, tokens: Tensor, runs: TokenRuns) -> Tensor:
        tables = bank.parameters["embed"].unbind(0)
        rows = [picked_rows(table, ids, trained=True) for table, ids in zip(tables, runs.split(tokens), strict=True)]
        return torch.cat(rows).to(bank.buffers["dtype"])

    def head(self, bank: AdapterBank, hidden: Tensor, runs: TokenRuns) -> Tensor:
        heads = _of_runs(bank, "embed" if bank.config.tie_word_embeddings else "head", hidden.dtype)
        return torch.cat([linear(*piece) for piece in zip(runs.split(hidden), heads, strict=True)])

    def norm(self, bank: AdapterBank, layer: int, name: str) -> Tensor:
        return bank.parameters[name if layer < 0 else f"layers.{layer}.{name}"]

    def derive(self, bank: AdapterBank, weights: DecoderWeights) -> None:
        weights.require_dense("train")
        bank.buffers["dtype"] = weights.embed.dtype

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        for name, stacked in bank.parameters.items():
            base_tensor(weights, name).copy_(stacked[run].detach())
        return bank.config


def base_tensor(weights: DecoderWeights, name: str) -> Tensor:
    """The base weight of a name such as `embed` or `layers.3.qkv`."""
    owner: Any = weights
    if name.startswith("layers."):
        _, layer, name = name.split(".")
        owner = weights.layers[int(layer)]
    tensor: Tensor = getattr(owner, name)
    return tensor


def _of_runs(bank: AdapterBank, name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Each run's tensor of a name, in the compute dtype."""
    return bank.parameters[name].to(dtype).unbind(0)
