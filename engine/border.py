"""Borders around frozen weights: spare columns and rows in which a low-rank update joins the base product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels import triton, tuning
from peftdyno.kernels.nf4 import Weight


def lay_borders(weights: DecoderWeights, bank: AdapterBank) -> int:
    """Give every product that the bank edits the room it needs, moving one weight at a time; returns the bytes added.

    A weight [out, in] becomes a view of [out + spare, in + spare]; one that has just this room stays, one that has
    more than it needs gives it back. A weight in 4 bits stays, for its products are not bordered.
    """
    return _lay(weights, bank, lambda weight, spread: True)


def fit_borders(weights: DecoderWeights, bank: AdapterBank, device: torch.device) -> int:
    """Borders where products on the device take the bordered form, and none elsewhere; returns the bytes added.

    Those that an earlier bank left are taken away. On a CPU weights stay as they are: no operator reads borders there.
    """
    if not triton.serves("lora_linear", device):
        return 0
    return _lay(weights, bank, lambda weight, spread: _taken(weight, spread, device))


def _taken(weight: Tensor, spread: int, device: torch.device) -> bool:
    """Whether a product with low-rank terms of `spread` columns takes the bordered form in some direction."""
    widths = (weight.shape[1], weight.shape[0], spread)
    return any(tuning.takes(name, "bordered", widths, device) for name in ("lora_linear", "lora_linear_backward"))


def _lay(weights: DecoderWeights, bank: AdapterBank, wanted: Callable[[Tensor, int], bool]) -> int:
    """Make every border what it should be: the bank's room where it is wanted, else none."""
    added, places = 0, set()
    for i, layer in enumerate(weights.layers):
        for site in SITES:
            weight: Weight = getattr(layer, site)
            if not isinstance(weight, Tensor):
                continue
            spread = bank.method.spare(bank, i, site)
            if spread and wanted(weight, spread):
                places.add((i, site))
            bank.bordered = frozenset(places)
            spare = bank.spare(i, site)
            if spare != weight.stride(0) - weight.shape[1]:
                setattr(layer, site, _bordered(weight, spare))
                added += getattr(layer, site).untyped_storage().nbytes() - weight.untyped_storage().nbytes()
    return added


def _bordered(weight: Tensor, spare: int) -> Tensor:
    out, columns = weight.shape
    storage = torch.zeros(out + spare, columns + spare, dtype=weight.dtype, device=weight.device)
    view = storage[:out, :columns]
    return view.copy_(weight)
