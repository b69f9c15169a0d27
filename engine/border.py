"""Borders around frozen weights: spare columns and rows in which a low-rank update joins the base product."""

from __future__ import annotations

import torch
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.nf4 import Weight


def lay_borders(weights: DecoderWeights, bank: AdapterBank) -> int:
    """Give every product that the bank edits the room it needs, moving one weight at a time; returns the bytes added.

    A weight [out, in] becomes a view of [out + spare, in + spare]; one that has the room already stays, and so does
    one in 4 bits, whose products are not bordered.
    """
    added = 0
    for i, layer in enumerate(weights.layers):
        for site in SITES:
            spare = bank.method.spare(bank, i, site)
            weight: Weight = getattr(layer, site)
            if isinstance(weight, Tensor) and spare > weight.stride(0) - weight.shape[1]:
                setattr(layer, site, _bordered(weight, spare))
                added += getattr(layer, site).untyped_storage().nbytes() - weight.untyped_storage().nbytes()
    bank.bordered = True
    return added


def _bordered(weight: Tensor, spare: int) -> Tensor:
    out, columns = weight.shape
    storage = torch.zeros(out + spare, columns + spare, dtype=weight.dtype, device=weight.device)
    view = storage[:out, :columns]
    return view.copy_(weight)
