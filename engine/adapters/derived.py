"""Tensors computed from parameters once a step, whose gradients are carried back once a step."""

from __future__ import annotations

import torch
from torch import Tensor


class Derived:
    """Cuts the graph between parameters and layers, so that several packs can be run backward in one step."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def leaf(self, value: Tensor) -> Tensor:
        """The value for the layers to use; its gradient is kept until `carry`."""
        if not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self._pairs.append((value, leaf))
        return leaf

    def carry(self) -> None:
        """Carry the gradients that reached the leaves on to the parameters."""
        pairs = [(value, leaf.grad) for value, leaf in self._pairs if leaf.grad is not None]
        self._pairs.clear()
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
