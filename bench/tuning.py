"""Shapes of a model at which its GPU kernels are tuned."""

from __future__ import annotations

from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.config import DecoderConfig
from peftdyno.kernels.triton.tune_subjects import Product, TuneSizes


def tune_sizes(config: DecoderConfig, *, tokens: int, rank: int, runs: int) -> TuneSizes:
    """The fused products of a layer with low-rank terms on every projection, and its attention."""
    products = []
    for modules in SITES.values():
        shapes = [config.linear_shape(module) for module in modules]
        products.append(Product(columns=shapes[0][1], outs=tuple(rows for rows, _ in shapes)))
    return TuneSizes(
        tokens=tokens,
        products=tuple(dict.fromkeys(products)),
        rank=rank,
        runs=runs,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
