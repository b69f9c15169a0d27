"""Frozen products on strided rows in C++."""

import pytest
import torch

from peftdyno.kernels.library import PRIMITIVES
from peftdyno.kernels.panels import drop_panels, keep_panels


@pytest.mark.parametrize(("tokens", "out", "columns"), [(1, 1, 1), (63, 127, 64), (127, 96, 63)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_strides(check, rows, dtype, tokens, out, columns, with_bias) -> None:
    x, weight = rows(tokens, columns, dtype, spare=5), rows(out, columns, dtype, spare=8)
    y = check("linear", x, weight, torch.randn(out).to(dtype) if with_bias else None, 16)
    assert y.stride(0) == out + 16
    check("linear_backward", rows(tokens, out, dtype, spare=3), weight)


@pytest.mark.parametrize(("tokens", "depth", "columns"), [(384, 2080, 72), (401, 2080, 33), (390, 8224, 40)])
def test_deep_gradient(check, rows, dtype, tokens, depth, columns) -> None:
    """Shapes that bf16 tiles take from the library: the depth in several blocks, the last rows and columns partial."""
    check("linear_backward", rows(tokens, depth, dtype, spare=3), rows(depth, columns, dtype))


def test_deep_gradient_has_the_same_bits_on_two_threads(isa, rows) -> None:
    if isa != "amx":
        pytest.skip("the library multiplies")
    dy, weight = rows(401, 2080, torch.bfloat16), rows(2080, 72, torch.bfloat16)
    alone = PRIMITIVES["linear_backward"].implementations["cpu"](dy, weight)
    torch.set_num_threads(2)
    assert torch.equal(PRIMITIVES["linear_backward"].implementations["cpu"](dy, weight), alone)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33, 63])
@pytest.mark.parametrize("out", [96, 40])
def test_panels(check, rows, dtype, tokens, out) -> None:
    x, weight, bias = rows(tokens, 64, dtype, spare=5), rows(out, 64, dtype), torch.randn(out).to(dtype)
    keep_panels(weight)
    try:
        check("linear", x, weight, bias, 0)
        a, b = [torch.randn(2, 5, 64) / 8], [torch.randn(2, 32, 5)]
        runs = [0, min(tokens, 20), tokens]
        check("lora_linear", x, weight, bias, a, b, [0.5, 2.0], [0, 32], runs, 0.0, None, None, 0, 0, 0)
        weight += 1
        check("linear", x, weight, bias, 0)
    finally:
        drop_panels(weight)
