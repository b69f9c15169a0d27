"""Folding a trained adapter into the base weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import Family, family_of
from peftdyno.engine.weights import DecoderWeights, field_shape

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank

BIASED_SITES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o"}
"""Projection -> the fused product whose bias it shares, where a decoder can have one."""


def merge_adapter(
    config: DecoderConfig, weights: DecoderWeights, family: Family, bank: AdapterBank, run: int
) -> DecoderConfig:
    """Fold one run into the weights, in place; the config of the model that they then are.

    The bank must not be used with the merged weights. UserError where the method has no merged form, the family's
    checkpoints have no place for it, or the weights are in 4 bits; the weights are then as they were.
    """
    assert bank.config == config, (bank.config, config)
    weights.require_dense("merge an adapter into")
    with torch.no_grad():
        merged = bank.methods[run].merge(bank, run, weights)
    family.to_hf(merged)
    return merged


def add_biases(
    config: DecoderConfig, weights: DecoderWeights, biases: Mapping[tuple[int, str], Tensor]
) -> DecoderConfig:
    """Add biases [out], given by (layer, projection), and zeros where the family then needs a bias beside them.

    UserError, before anything is changed, where the family's checkpoints have no such bias.
    """
    if not biases:
        return config
    biased = _biased_config(config, {module for _, module in biases})
    for layer in weights.layers:
        for name, wanted in (("qkv_bias", biased.attention_bias), ("o_bias", biased.attention_output_bias)):
            if wanted and getattr(layer, name) is None:
                setattr(layer, name, layer.input_norm.new_zeros(field_shape(biased, name)))
    from peftdyno.engine.adapters.method import module_bias

    for (index, module), bias in biases.items():
        target = module_bias(weights, biased, index, module)
        assert target is not None, (index, module)
        target.copy_(target + bias)
    return biased


def _biased_config(config: DecoderConfig, modules: set[str]) -> DecoderConfig:
    """The config with the fewest biases that the family can write and that covers the projections."""
    if without := sorted(modules - BIASED_SITES.keys()):
        raise UserError(f"cannot merge a bias into {without[0]}: the decoder has none there; keep the adapter apart")
    output = config.attention_output_bias or "o_proj" in modules
    inner = config.attention_bias or modules != {"o_proj"}
    reason = ""
    for choice in ((inner, output), (True, True)):
        candidate = replace(config, attention_bias=choice[0], attention_output_bias=choice[1])
        try:
            family_of(config).to_hf(candidate)
        except UserError as error:
            reason = reason or str(error)
        else:
            return candidate
    raise UserError(f"cannot merge biases into {', '.join(sorted(modules))}: {reason}; keep the adapter apart")
