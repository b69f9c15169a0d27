"""LoRA: W x + s B A drop(x) on chosen projections (Hu et al. 2021); s = alpha / r, or alpha / sqrt(r) (rsLoRA,
Kalajdzievski 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.method import MODULES, SITES, Method, module_rows
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import LinearEdits, LowRank

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Rank-r update of each target projection; A starts uniform in +-1/sqrt(in), B at zero."""

    name: ClassVar[str] = "lora"
    per_run: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rank_stabilised")

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        for module in self.target_modules:
            if module not in MODULES:
                raise unknown("lora.target_modules entry", module, MODULES)
        if self.rank < 1:
            raise UserError(f"lora.rank {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout {self.dropout} must be in [0, 1)")

    @property
    def scaling(self) -> float:
        """The factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(config.num_hidden_layers):
            for module in (m for m in MODULES if m in self.target_modules):
                out, columns = config.linear_shape(module)
                shapes[f"layers.{layer}.{module}.A"] = (self.rank, columns)
                shapes[f"layers.{layer}.{module}.B"] = (out, self.rank)
        return shapes

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        if name.endswith(".B"):
            return np.zeros(shape, dtype=np.float32)
        bound = 1 / math.sqrt(shape[1])
        return random.uniform(-bound, bound, shape).astype(np.float32)

    def uses_dropout(self) -> bool:
        return self.dropout > 0

    def _targets(self, site: str) -> list[str]:
        return [m for m in SITES[site] if m in self.target_modules]

    def linear(self, bank: AdapterBank, layer: int, site: str) -> LinearEdits | None:
        targets = self._targets(site)
        if not targets:
            return None
        rows = module_rows(bank.config, site)
        scaling = tuple(method.scaling for method in bank.methods if isinstance(method, LoRA))
        low_rank = tuple(
            LowRank(
                start=rows[module][0],
                stop=rows[module][1],
                a=bank.parameters[f"layers.{layer}.{module}.A"],
                b=bank.parameters[f"layers.{layer}.{module}.B"],
                scaling=scaling,
            )
            for module in targets
        )
        dropout = self.dropout if bank.training else 0.0
        keys = torch.tensor([bank.keys(f"dropout.{module}", layer) for module in targets]) if dropout else None
        return LinearEdits(low_rank=low_rank, dropout=dropout, keys=keys)

    def spare(self, bank: AdapterBank, layer: int, site: str) -> int:
        return len(self._targets(site)) * self.rank * bank.num_runs

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        for layer, layer_weights in enumerate(weights.layers):
            for site in SITES:
                rows = module_rows(bank.config, site)
                for module in self._targets(site):
                    a, b = (bank.parameters[f"layers.{layer}.{module}.{x}"][run].detach() for x in "AB")
                    piece = getattr(layer_weights, site)[slice(*rows[module])]
                    piece.copy_((piece.float() + self.scaling * (b @ a)).to(piece.dtype))
        return bank.config
