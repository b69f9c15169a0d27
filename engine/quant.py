"""Base models in 4 bits: the weights of the linear products quantised, embeddings, norms, biases and head as they are.

The products dequantise a weight for as long as they run (QLoRA, Dettmers et al. 2023, eq. 5); adapters act on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.adapters.method import MODULES, SITES, module_rows
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families import family_of
from peftdyno.engine.weight_files import TensorSource, check_tied_head, match_names, to_state_dict
from peftdyno.engine.weights import DecoderWeights, LayerWeights, empty_weights, layer_parts
from peftdyno.kernels.nf4 import BLOCK, Nf4Weight, Weight, dense, quantise, stacked

QUANTISATIONS: dict[str, bool] = {"nf4": False, "nf4-double": True}
"""What `--quant` may name -> whether the absolute maxima are quantised too (double quantisation, sec. 3)."""


def check_quantisation(config: DecoderConfig, kind: str) -> None:
    """UserError for an unknown kind, and for a model whose modules cannot be divided into whole blocks."""
    if kind not in QUANTISATIONS:
        raise unknown("quantisation", kind, QUANTISATIONS)
    for module in MODULES:
        rows, columns = config.linear_shape(module)
        if rows * columns % BLOCK:
            raise UserError(
                f"--quant {kind} needs modules of a multiple of {BLOCK} weights; {module} has {rows} x {columns}; "
                "load this model without quantisation"
            )


def quantise_weights(weights: DecoderWeights, config: DecoderConfig, kind: str) -> DecoderWeights:
    """The same model with its linear weights in 4 bits, each module quantised by itself; all else is shared.

    The compute dtype stays that of `weights`. On the meta device it gives the sizes. UserError as `check_quantisation`.
    """
    check_quantisation(config, kind)
    return replace(weights, layers=[_quantise_layer(layer, config, kind) for layer in weights.layers])


def _quantise_layer(layer: LayerWeights, config: DecoderConfig, kind: str) -> LayerWeights:
    quantised: dict[str, Any] = {}
    for site in SITES:
        weight: Weight = getattr(layer, site)
        if isinstance(weight, Nf4Weight):
            raise UserError("the weights are in 4 bits already")
        rows = module_rows(config, site).values()
        quantised[site] = quantise_modules((weight[start:stop] for start, stop in rows), kind)
    return replace(layer, **quantised)


def quantise_modules(modules: Iterable[Tensor], kind: str) -> Nf4Weight:
    """The modules of one product, each quantised by itself and let go before the next is asked for."""
    return stacked([quantise(module, nested=QUANTISATIONS[kind]) for module in modules])


def dequantise_weights(weights: DecoderWeights) -> DecoderWeights:
    """The model that quantised weights stand for, dense in their compute dtype, to be stored or merged into; no
    tensor is shared with `weights`."""
    layers = []
    for layer in weights.layers:
        copies: dict[str, Any] = {field.name: _copy(getattr(layer, field.name)) for field in fields(layer)}
        layers.append(LayerWeights(**copies))
    embed = weights.embed.clone()
    head = embed if weights.head is weights.embed else weights.head.clone()
    return DecoderWeights(embed=embed, layers=layers, final_norm=weights.final_norm.clone(), head=head)


def _copy(weight: Weight | None) -> Tensor | None:
    return weight.clone() if isinstance(weight, Tensor) else None if weight is None else dense(weight)


def load_quantised_weights(
    config: DecoderConfig,
    source: TensorSource,
    kind: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DecoderWeights:
    """Reads the weights of a decoder and quantises each linear one as it comes: at any time at most one of them is
    dense. They are rounded to `dtype`, the compute dtype, before they are quantised.

    UserError as `load_weights` and `check_quantisation`.
    """
    check_quantisation(config, kind)
    family = family_of(config)
    weights = empty_weights(config, dtype)
    names = match_names(family, source, to_state_dict(weights, config, family), config)

    def read(part: str, layer: int = 0) -> Tensor:
        return source.read(names[family.tensor_name(part, layer)]).to(device, dtype)

    for i, layer in enumerate(weights.layers):
        for name, parts in layer_parts(config).items():
            pieces = (read(part, i) for part in parts)
            setattr(layer, name, quantise_modules(pieces, kind) if name in SITES else torch.cat(list(pieces)))
    weights.embed, weights.final_norm = read("embed.weight"), read("final_norm.weight")
    weights.head = weights.embed if config.tie_word_embeddings else read("head.weight")
    if config.tie_word_embeddings:
        check_tied_head(family, source, names, weights.embed)
    return weights
