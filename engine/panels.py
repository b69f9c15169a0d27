"""Products on the CPU: the frozen weights kept a second time in the form that they read fastest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from peftdyno.engine.decoder import Decoder
from peftdyno.kernels.panels import drop_panels, keep_panels, panel_bytes

PackWeights = Literal["auto", "on", "off"]
AUTO_SHARE = 0.5
"""Of the free memory that `auto` takes at most."""


@contextmanager
def packed_weights(decoder: Decoder, choice: PackWeights = "auto", *, backward: bool = False) -> Iterator[int]:
    """While it lasts, products read panels of the weights, with `backward` those of the backward pass too; gives the
    bytes they take, 0 where there are none.

    `auto` keeps them where they fit into half of the free memory. Results are the same to the bit as those without:
    panels hold what a product would pack, and it sums in the same order.
    """
    weights = [] if choice == "off" else [w for w in _products(decoder) if panel_bytes(w, backward=backward)]
    if choice == "auto" and held_bytes(decoder, backward=backward) > AUTO_SHARE * _free_bytes():
        weights = []
    kept: list[Tensor] = []
    try:
        held = 0
        for weight in weights:
            held += keep_panels(weight, backward=backward)
            kept.append(weight)
        yield held
    finally:
        for weight in kept:
            drop_panels(weight)


def held_bytes(decoder: Decoder, *, backward: bool = False) -> int:
    """Bytes that all panels of a model take."""
    return sum(panel_bytes(weight, backward=backward) for weight in _products(decoder))


def _products(decoder: Decoder) -> list[Tensor]:
    """The frozen factors of the decoder's products that are not in 4 bits."""
    found = [w for layer in decoder.weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [w for w in (*found, decoder.weights.head) if isinstance(w, Tensor)]


def _free_bytes() -> int:
    """Memory that no process uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
