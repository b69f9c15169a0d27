"""Every written-out gradient, in float64, against autograd through the reference and against finite differences.

Kernels are compared with these references elsewhere; here the references' own equations are judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from peftdyno.kernels.library import PRIMITIVES
from peftdyno.kernels.oracle import Float64
from peftdyno.kernels.rms_norm import rows_of_runs

from .test_attention import FORESTS

RUNS = [0, 4, 4, 9]
"""Rows of three runs; the second has none."""


@dataclass
class Case:
    """An operator of `inputs` whose result `forward` gives, and `backward(dy, *inputs)` the gradient of each."""

    inputs: Sequence[Tensor]
    forward: Callable[..., Tensor]
    backward: Callable[..., Sequence[Tensor]]


def op(name: str) -> Callable:
    return PRIMITIVES[name].implementations["reference"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def in_place(name: str, y: Tensor, *rest: object) -> Tensor:
    copy = y.clone()
    op(name)(copy, *rest)
    return copy


def rms_norm(with_residual: bool) -> Case:
    def forward(weight, x, residual=None):
        y, h, _ = op("rms_norm")(x, residual, weight, RUNS, 1e-5, 1.0, 0)
        return y if residual is None else torch.cat([y, h])

    def backward(dy, weight, x, residual=None):
        _, h, rstd = op("rms_norm")(x, residual, weight, RUNS, 1e-5, 1.0, 0)
        dy, dh = (dy, None) if residual is None else dy.chunk(2)
        dx, dweight = op("rms_norm_backward")(dy, dh, x if residual is None else h, weight, rstd, RUNS, 1.0, True)
        return (dweight, dx) if residual is None else (dweight, dx, dx)

    rows = [random(9, 7) for _ in range(1 + with_residual)]
    return Case([random(3, 7), *rows], forward, backward)


def glu(activation: str) -> Case:
    return Case(
        [3 * random(9, 10), random(3, 5)],
        lambda x, scale: op("glu")(x, scale, activation, RUNS, 0),
        lambda dy, x, scale: op("glu_backward")(dy, x, scale, activation, RUNS, 0),
    )


def attention(forest: str, window: int = 0, softcap: float = 0.0) -> Case:
    layout = FORESTS[forest]
    extra = max(row + keys for row, keys, _ in layout.chain) - layout.rows
    options = (*layout.tables(), 0.4, window, softcap, 0)

    def given(inputs):
        return (*inputs, None, None) if len(inputs) == 3 else inputs

    def backward(dout, *inputs):
        out, lse = op("attention")(*given(inputs), *options)
        dqkv, *dprefix = op("attention_backward")(dout, *given(inputs), out, lse, *options)
        dq, dk, dv = dqkv.unflatten(1, (8, 5)).split((4, 2, 2), dim=1)
        return [dq, dk, dv, *dprefix][: len(inputs)]

    inputs = [random(layout.rows, heads, 5) for heads in (4, 2, 2)] + [random(extra, 2, 5) for _ in range(2)]
    return Case(inputs if extra else inputs[:3], lambda *x: op("attention")(*given(x), *options)[0], backward)


def lora_linear(dropout: float) -> Case:
    weight, bias = random(12, 8), random(12)
    streams, keys = torch.randint(2**62, (9,)), torch.randint(2**62, (2, 3))
    options = ([0.5, 2.0, 1.0, 0.3, 1.5, 0.7], [0, 5, 6, 12], RUNS, dropout, streams, keys)

    def backward(dy, x, *factors):
        _, u = op("lora_linear")(x, weight, bias, factors[:2], factors[2:], *options, 0, 0, 0)
        dx, da, db = op("lora_linear_backward")(dy, x, u, weight, factors[:2], factors[2:], *options, 0, True)
        return dx, *da, *db

    return Case(
        [random(9, 8), random(3, 2, 8), random(3, 3, 8), random(3, 5, 2), random(3, 6, 3)],
        lambda x, *factors: op("lora_linear")(x, weight, bias, factors[:2], factors[2:], *options, 0, 0, 0)[0],
        backward,
    )


def label_loss(softcap: float) -> Case:
    head, targets = random(20, 6), torch.randint(20, (9,))
    return Case(
        [2 * random(9, 6)],
        lambda x: op("label_loss")(x, head, targets, softcap, False)[0],
        lambda dloss, x: [op("scale_rows")(op("label_loss")(x, head, targets, softcap, True)[1], dloss)],
    )


def linear() -> Case:
    weight, bias = random(7, 5), random(7)
    return Case(
        [random(9, 5)], lambda x: op("linear")(x, weight, bias, 0), lambda dy, x: [op("linear_backward")(dy, weight)]
    )


def rotary() -> Case:
    cos, sin = random(9, 3).cos(), random(9, 3).sin()  # not of one angle: the inverse is then the transpose only
    return Case(
        [random(9, 14)],
        lambda x: in_place("rotary_", x, cos, sin, 2, False),
        lambda dy, x: [in_place("rotary_", dy, cos, sin, 2, True)],
    )


def bank_scale() -> Case:
    def scaled(y, scale):
        """As the operator does in place, where autograd cannot follow."""
        out = torch.cat([y[:, :2], y[:, 2:7] * rows_of_runs(scale, RUNS), y[:, 7:]], dim=1)
        assert torch.equal(out, in_place("bank_scale_", y.detach(), scale.detach(), 2, RUNS))
        return out

    return Case(
        [random(9, 8), random(3, 5)],
        scaled,
        lambda dy, y, scale: (
            in_place("bank_scale_", dy, scale, 2, RUNS),
            op("bank_column_sums")(dy, y[:, 2:7], 2, 5, RUNS),
        ),
    )


def bank_shift() -> Case:
    return Case(
        [random(9, 8), random(3, 5)],
        lambda y, shift: in_place("bank_shift_", y, shift, 2, RUNS),
        lambda dy, y, shift: (dy, op("bank_column_sums")(dy, None, 2, 5, RUNS)),
    )


CASES = {
    "rms_norm": lambda: rms_norm(False),
    "rms_norm, residual": lambda: rms_norm(True),
    "glu, silu": lambda: glu("silu"),
    "glu, gelu_tanh": lambda: glu("gelu_tanh"),
    "attention": lambda: attention("two-trees"),
    "attention, prefix": lambda: attention("prefix"),
    "attention, window": lambda: attention("shared", window=7),
    "attention, softcap": lambda: attention("shared", softcap=1.5),
    "lora_linear": lambda: lora_linear(0.0),
    "lora_linear, dropout": lambda: lora_linear(0.25),
    "label_loss": lambda: label_loss(0.0),
    "label_loss, softcap": lambda: label_loss(3.0),
    "linear": linear,
    "rotary": rotary,
    "bank_scale": bank_scale,
    "bank_shift": bank_shift,
}


@pytest.mark.parametrize("name", CASES)
def test_against_autograd_and_differences(name) -> None:
    """To 1e-10 of autograd's, as both are float64; to 1e-6 of central differences, whose own error is about 1e-9."""
    case, step = CASES[name](), 1e-5
    with Float64():
        inputs = [x.clone().requires_grad_() for x in case.inputs]
        y = case.forward(*inputs)
        dy = random(*y.shape)
        expected = torch.autograd.grad(y, inputs, dy)
        written = case.backward(dy, *case.inputs)
        assert len(written) == len(inputs)
        for i, (ours, theirs, x) in enumerate(zip(written, expected, case.inputs, strict=True)):
            assert ours.dtype == torch.float64 and ours.shape == x.shape
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm(), f"{name}: gradient {i} is not autograd's"
            along = random(*x.shape)
            ahead, behind = (
                case.forward(*case.inputs[:i], x + sign * step * along, *case.inputs[i + 1 :]) for sign in (1, -1)
            )
            difference = float(((ahead - behind) * dy).sum()) / (2 * step)
            scale = float(ours.norm() * along.norm())
            assert abs(float((ours * along).sum()) - difference) <= 1e-6 * scale, f"{name}: gradient {i}"
