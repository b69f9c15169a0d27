"""How the operators' autograd functions are called: tracked where gradients are wanted, else the forward pass alone."""

from __future__ import annotations

from typing import Any

import torch


class _Untracked:
    """Context of a forward pass that no backward pass follows: what is kept on it goes with it."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *_: Any) -> None:
        """Nothing is kept."""

    def mark_non_differentiable(self, *_: Any) -> None:
        """Nothing is."""

    def set_materialize_grads(self, _: bool) -> None:
        """There are no gradients."""


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, without what only functorch's transforms and the backward pass need.

    Where gradients are off (`torch.no_grad`) nothing is recorded: a node costs more than a small kernel.
    """
    if not torch.is_grad_enabled():
        return function.forward(_Untracked(), *args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]
