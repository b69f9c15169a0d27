"""How autograd functions are called, with gradients and without."""

from typing import ClassVar

import torch
from torch import Tensor

from peftdyno.kernels.autograd import apply


class Cube(torch.autograd.Function):
    """x^3; `wanted` holds what the forward pass saw of its inputs' needs."""

    wanted: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        Cube.wanted.append(ctx.needs_input_grad[0])
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x**3

    @staticmethod
    def backward(ctx, dy: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        return None if dy is None else 3 * x**2 * dy


def test_gradients_are_those_of_the_function() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply(Cube, x), x)


def test_nothing_is_recorded_where_gradients_are_off() -> None:
    x = torch.randn(5, requires_grad=True)
    Cube.wanted.clear()
    with torch.no_grad():
        y = apply(Cube, x)
    assert torch.equal(y, x.detach() ** 3) and not y.requires_grad and y.grad_fn is None
    assert apply(Cube, x).grad_fn is not None
    assert Cube.wanted == [False, True]
