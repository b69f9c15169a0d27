"""SVFT: y += U diag(m) V^T x on the fixed singular bases of each target weight, W = U S V^T
(Lingam et al. 2024, arXiv:2405.19597, equation 1 with the plain, diagonal, pattern)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from peftdyno.engine.adapters.method import MODULES, SITES, Method, module_rows, module_weight
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.linear import linear
from peftdyno.kernels.nf4 import Weight
from peftdyno.kernels.rms_norm import rows_of_runs

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank


@dataclass(frozen=True, kw_only=True)
class SVFT(Method):
    """m [min(out, in)] of each target starts at zero, so the model starts as the base.

    The bases are computed once in fp32 and shared by all runs of a bank, in the compute dtype: min(out, in) * (out +
    in) values a target. A token's update is two products with them and a scale between, so R runs need no R-fold
    copies. Stored are m and the hash of the target weights, which says what the bases are: that a pair of columns of U
    and V may change sign together does not show in the update.
    """

    name: ClassVar[str] = "svft"
    per_run: ClassVar[tuple[str, ...]] = ("weights_sha256",)

    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    weights_sha256: str = ""
    """Hash of the target weights (in fp32) that the bases come from; a bank fills in an empty one."""

    def __post_init__(self) -> None:
        for module in self.target_modules:
            if module not in MODULES:
                raise unknown("svft.target_modules entry", module, MODULES)

    def _targets(self, site: str) -> list[str]:
        return [m for m in SITES[site] if m in self.target_modules]

    def _places(self, config: DecoderConfig) -> list[tuple[int, str]]:
        """(layer, module) of every target."""
        targets = [m for m in MODULES if m in self.target_modules]
        return [(layer, module) for layer in range(config.num_hidden_layers) for module in targets]

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        places = self._places(config)
        return {f"layers.{layer}.{module}.m": (min(config.linear_shape(module)),) for layer, module in places}

    def inference_count(self, config: DecoderConfig) -> int:
        shapes = [config.linear_shape(module) for _, module in self._places(config)]
        return sum(min(shape) * (sum(shape) + 1) for shape in shapes)

    def derive(self, bank: AdapterBank, weights: DecoderWeights) -> None:
        digest = hashlib.sha256()
        for layer, module in self._places(bank.config):
            weight = module_weight(weights, bank.config, layer, module)
            bank.buffers[f"layers.{layer}.{module}"] = singular_bases(weight)
            if not weight.is_meta:
                digest.update(weight.float().contiguous().cpu().numpy().tobytes())
        if not weights.embed.is_meta:
            bank.methods = tuple(_identified(method, digest.hexdigest()) for method in bank.methods)

    def unrecordable(self) -> str:
        return "SVFT copies the bounds of the runs to the device in every product"

    def product(
        self,
        bank: AdapterBank,
        layer: int,
        site: str,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        runs: TokenRuns,
    ) -> Tensor | None:
        targets = self._targets(site)
        if not targets:
            return None
        y, pieces = linear(x, weight, bias), []
        for module, rows in module_rows(bank.config, site).items():
            piece = y[:, slice(*rows)]
            pieces.append(piece + _update(bank, f"layers.{layer}.{module}", x, runs) if module in targets else piece)
        return torch.cat(pieces, 1)

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        for layer, module in self._places(bank.config):
            m = bank.parameters[f"layers.{layer}.{module}.m"][run].detach()
            left, right = (x.to(m.dtype) for x in bank.buffers[f"layers.{layer}.{module}"])
            weight = module_weight(weights, bank.config, layer, module)
            weight.copy_(weight + (left * m) @ right)
        return bank.config


def _update(bank: AdapterBank, name: str, x: Tensor, runs: TokenRuns) -> Tensor:
    """U diag(m) V^T x of one target, each token with its run's m."""
    left, right = bank.buffers[name]
    scale = rows_of_runs(bank.parameters[f"{name}.m"], runs.offsets)
    return product(product(x, right) * scale.to(x.dtype), left)


def _identified(method: Method, digest: str) -> SVFT:
    """The method with the hash of the weights its bases come from; UserError where it was trained on others."""
    assert isinstance(method, SVFT)
    if method.weights_sha256 not in ("", digest):
        raise UserError(
            f"svft: the adapter belongs to target weights of sha256 {method.weights_sha256}, those of the base model "
            f"have {digest}; load the base model that it was trained on"
        )
    return replace(method, weights_sha256=digest)


def singular_bases(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U [out, k] and V^T [k, in] of a weight in its dtype, by falling singular value, computed in fp32 or better."""
    if weight.is_meta:
        out, width = weight.shape
        return weight.new_empty(out, min(out, width)), weight.new_empty(min(out, width), width)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    return left.to(weight.dtype), right.to(weight.dtype)
