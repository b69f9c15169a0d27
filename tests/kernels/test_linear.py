"""Frozen products on strided rows in C++."""

import pytest
import torch

from peftdyno.kernels import cpu
from peftdyno.kernels.library import PRIMITIVES
from peftdyno.kernels.panels import drop_panels, keep_panels


@pytest.mark.parametrize(("tokens", "out", "columns"), [(1, 1, 1), (63, 127, 64), (127, 96, 63)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_strides(check, rows, dtype, tokens, out, columns, with_bias) -> None:
    x, weight = rows(tokens, columns, dtype, spare=5), rows(out, columns, dtype, spare=8)
    y = check("linear", x, weight, torch.randn(out).to(dtype) if with_bias else None, 16)
    assert y.stride(0) == out + 16
    check("linear_backward", rows(tokens, out, dtype, spare=3), weight)


SHAPES = {
    "one row": (1, 64, 40),
    "half a tile": (15, 96, 33),
    "a tile and one": (17, 96, 33),
    "last rows partial": (122, 576, 72),
    "many groups of columns": (65, 64, 1100),
    "many rows": (1300, 64, 300),
    "rows in three turns": (530, 1536, 72),
    "two blocks of depth": (40, 1568, 72),
    "deep": (401, 2080, 33),
    "many blocks of depth": (390, 8224, 40),
}
"""Rows, depth and columns of products of ours in bf16."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spare", [0, 7])
def test_blocks(check, rows, dtype, shape, spare) -> None:
    tokens, depth, columns = SHAPES[shape]
    check("linear", rows(tokens, depth, dtype, spare=3), rows(columns, depth, dtype, spare=spare), None, 0)
    check("linear_backward", rows(tokens, depth, dtype, spare=3), rows(depth, columns, dtype, spare=spare))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_two_threads(isa, rows, shape) -> None:
    if isa == "portable":
        pytest.skip("the library multiplies")
    tokens, depth, columns = SHAPES[shape]
    dy, weight = rows(tokens, depth, torch.bfloat16), rows(depth, columns, torch.bfloat16)
    calls = (("linear_backward", (dy, weight)), ("linear", (dy, weight.t().contiguous(), None, 0)))
    alone = [PRIMITIVES[name].implementations["cpu"](*given) for name, given in calls]
    torch.set_num_threads(2)
    for _ in range(3):  # threads come for units in another order each time
        again = [PRIMITIVES[name].implementations["cpu"](*given) for name, given in calls]
        assert all(map(torch.equal, again, alone))


def test_large_values_stay_finite_and_infinite_ones_do_not(isa, rows) -> None:
    x, weight = rows(33, 64, torch.bfloat16), rows(40, 64, torch.bfloat16)
    y = PRIMITIVES["linear"].implementations["cpu"](x * 1e18, weight * 1e18, None, 0)
    assert y.isfinite().all() and y.abs().max() > 1e36
    x[3, 5] = float("inf")
    y = PRIMITIVES["linear"].implementations["cpu"](x, weight, None, 0)
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


def half(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("weight", "bias", "says"),
    [
        (half(40, 32), None, r"factors of \[3, 64\] and \[40, 32\] do not make \[3, 40\]"),
        (half(40, 64).float(), None, "a product of BFloat16 by Float"),
        (half(40, 64), half(39), r"a bias of \[39\] BFloat16 for \[3, 40\]"),
        (half(40, 64), half(40).float(), r"a bias of \[40\] Float"),
    ],
)
def test_factors_that_do_not_fit(isa, weight, bias, says) -> None:
    if isa == "portable":
        pytest.skip("the library multiplies")
    with pytest.raises(RuntimeError, match=says):
        PRIMITIVES["linear"].implementations["cpu"](half(3, 64), weight, bias, 0)


def test_panels_kept_for_another_instruction_set(isa, rows) -> None:
    """What was packed for products of bf16 pairs is not read by one that widens."""
    x, weight = rows(5, 64, torch.bfloat16), rows(96, 64, torch.bfloat16)
    linear = PRIMITIVES["linear"].implementations["cpu"]
    keep_panels(weight)
    try:
        kept = linear(x, weight, None, 0)
        cpu.use_instruction_set("avx2" if "avx2" in cpu.instruction_sets() else "portable")
        assert (linear(x, weight, None, 0).float() - kept.float()).abs().max() < 0.1
    finally:
        drop_panels(weight)


@pytest.mark.parametrize(("tokens", "out", "columns"), [(70, 2080, 96), (33, 576, 1568), (5, 8224, 40), (500, 96, 64)])
def test_panels_of_a_backward_product(check, rows, dtype, tokens, out, columns) -> None:
    """One block of the depth and several; the last panel partly empty; a masked low-rank term beside them."""
    weight, runs = rows(out, columns, dtype), [0, tokens]
    x, a, b = rows(tokens, columns, dtype), [torch.randn(1, 8, columns) / 8], [torch.randn(1, 32, 8)]
    terms = [2.0], [64, 96], runs, 0.2, torch.arange(tokens), torch.ones(1, 1, dtype=torch.int64)
    keep_panels(weight, backward=True)
    try:
        dy = rows(tokens, out, dtype, spare=3)
        check("linear_backward", dy, weight)
        u = rows(tokens, 8, dtype)
        check("lora_linear_backward", dy, x, u, weight, a, b, *terms, 0, True)
    finally:
        drop_panels(weight)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33, 63])
@pytest.mark.parametrize("out", [96, 40])
def test_panels(check, rows, dtype, tokens, out) -> None:
    x, weight, bias = rows(tokens, 64, dtype, spare=5), rows(out, 64, dtype), torch.randn(out).to(dtype)
    keep_panels(weight, backward=True)
    try:
        check("linear", x, weight, bias, 0)
        a, b = [torch.randn(2, 5, 64) / 8], [torch.randn(2, 32, 5)]
        runs = [0, min(tokens, 20), tokens]
        check("lora_linear", x, weight, bias, a, b, [0.5, 2.0], [0, 32], runs, 0.0, None, None, 0, 0, 0)
        check("linear_backward", rows(tokens, out, dtype), weight)
        weight += 1
        check("linear", x, weight, bias, 0)
        check("linear_backward", rows(tokens, out, dtype), weight)
    finally:
        drop_panels(weight)
