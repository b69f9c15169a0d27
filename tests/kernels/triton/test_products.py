"""The fused product with a low-rank term, and 4-bit weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import linear, nf4, nf4_linear, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.triton import load, lora_gemm, nf4_gemm
from peftdyno.kernels.triton import nf4 as triton_nf4


def with_low_rank(x: Tensor, weight: Tensor, u: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The definition, one rounding at the end."""
    return (x.float() @ weight.float().t() + u.float() @ up.float().t() + bias.float()).to(x.dtype)


def with_low_rank_backward(dy: Tensor, weight: Tensor, du: Tensor, down: Tensor) -> Tensor:
    """The definition, one rounding at the end."""
    return (dy.float() @ weight.float() + du.float() @ down.float()).to(dy.dtype)


def rows_beside_others(rows: int, columns: int, dtype: torch.dtype, device: Any) -> Tensor:
    """Random rows with 8 more columns to their right."""
    return with_spare(rows, columns, 8, torch.empty(0, dtype=dtype, device=device)).copy_(torch.randn(rows, columns))


@pytest.mark.parametrize(("rows", "columns", "out", "spread"), [(1, 8, 8, 8), (150, 136, 264, 24)])
def test_fused_product(rows: int, columns: int, out: int, spread: int, dtype: torch.dtype, device: Any) -> None:
    shapes = ((rows, columns), (out, columns), (rows, spread), (out, spread))
    operands = [rows_beside_others(*shape, dtype, device) for shape in shapes]
    operands.append(torch.randn(out, device=device).to(dtype))
    with tuning.trial("lora_gemm", tuning.Tile(128, 64, 8, 3)):
        y = lora_gemm.product(*operands, spare=8)
    assert y.stride(0) == out + 8
    truth = in_float64(with_low_rank, operands)
    assert not excess("fused product", y, with_low_rank(*operands), truth)


@pytest.mark.parametrize(("rows", "columns", "out", "spread"), [(1, 8, 8, 8), (150, 136, 264, 24)])
def test_fused_product_backward(
    rows: int, columns: int, out: int, spread: int, dtype: torch.dtype, device: Any
) -> None:
    shapes = ((rows, out), (out, columns), (rows, spread), (spread, columns))
    operands = [rows_beside_others(*shape, dtype, device) for shape in shapes]
    with tuning.trial("lora_gemm_backward", tuning.Tile(128, 64, 8, 3)):
        dx = lora_gemm.product_backward(*operands)
    truth = in_float64(with_low_rank_backward, operands)
    assert not excess("fused product, backward", dx, with_low_rank_backward(*operands), truth)


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 576), (63, 128)])
def test_nf4_dequantise_gives_the_same_bits(rows: int, columns: int, dtype: torch.dtype, device: Any) -> None:
    codes = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(rows * columns // nf4.BLOCK, device=device)
    arguments = (codes, absmax, rows, columns, dtype)
    assert torch.equal(load("nf4_dequantise")(*arguments), nf4.reference_dequantise(*arguments))


def test_nf4_of_more_elements_than_32_bits_count(device: Any) -> None:
    """The first program of a weight of 2**31 elements stores its part."""
    codes = torch.randint(256, (1024,), dtype=torch.uint8, device=device)
    absmax, out = torch.rand(32, device=device), torch.zeros(2048, device=device)
    triton_nf4._dequantise[(1,)](codes, absmax, nf4.codebook(codes.device), out, 2**25, BLOCKS=32, BLOCK=64)
    assert torch.equal(out, nf4.reference_dequantise(codes, absmax, 1, 2048, torch.float32)[0])


@pytest.mark.parametrize("sizes", [[1], [255, 1, 0, 300], [1024, 1, 2049]])
def test_nested_absmax_gives_the_same_bits(sizes: list[int], device: Any) -> None:
    """Modules that end within a block of the second level, beside one that is empty."""
    blocks = sum(-(-size // nf4.NESTED_BLOCK) for size in sizes)
    codes = torch.randint(256, (sum(sizes),), dtype=torch.uint8, device=device)
    arguments = (codes, torch.rand(blocks, device=device), torch.randn(len(sizes), device=device), sizes)
    assert torch.equal(load("nf4_absmax")(*arguments), nf4.reference_absmax(*arguments))


def test_an_explicit_choice_of_triton_serves_double_quantisation(device: Any, triton_kernels: None) -> None:
    weight = nf4.stacked([nf4.quantise(torch.randn(n, 64, device=device), nested=True) for n in (300, 1)])
    assert isinstance(weight.absmax, nf4.NestedAbsmax)
    scales = weight.absmax
    expected = nf4.reference_absmax(scales.codes, scales.absmax, scales.offsets, list(scales.sizes))
    assert torch.equal(weight.dense(), nf4.reference_dequantise(weight.codes, expected, *weight.shape, weight.dtype))


@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 64, 1), (19, 96, 130)])
def test_products_that_dequantise_on_the_way(
    rows: int, columns: int, out: int, dtype: torch.dtype, device: Any
) -> None:
    weight = nf4.quantise(torch.randn(out, columns, device=device).to(dtype))
    x, dy = (rows_beside_others(rows, n, dtype, device) for n in (columns, out))
    for bias in (None, torch.randn(out, device=device).to(dtype)):
        forward = (x, weight.codes, weight.scales(), out, bias, 8)
        y = load("nf4_linear")(*forward)
        assert y.stride(0) == out + 8
        truth = in_float64(with_dequantised, (x, weight.dense(), bias))
        assert not excess("nf4_linear", y, nf4_linear.reference_forward(*forward), truth)
    backward = (dy, weight.codes, weight.scales(), columns)
    truth = in_float64(torch.mm, (dy, weight.dense()))
    assert not excess(
        "backward", load("nf4_linear_backward")(*backward), nf4_linear.reference_backward(*backward), truth
    )


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_share_the_columns_among_programs(
    bias: bool, dtype: torch.dtype, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of the columns a program, the last shorter than the others, summed in a fixed order."""
    rows, columns, out = 3, 27 * 64, 70
    launched: list[int] = []
    parts = nf4_gemm._parts
    monkeypatch.setattr(nf4_gemm, "_parts", lambda *a: (launched.append(parts(*a)[0]), parts(*a))[1])
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 8)
    weight = nf4.quantise((torch.randn(out, columns, device=device) / 40).to(dtype))
    beside = torch.randn(out, device=device).to(dtype) if bias else None
    forward = (rows_beside_others(rows, columns, dtype, device), weight.codes, weight.scales(), out, beside, 8)
    y, again = load("nf4_linear")(*forward), load("nf4_linear")(*forward)
    assert launched == [3, 3] and torch.equal(y, again) and y.stride(0) == out + 8
    truth = in_float64(with_dequantised, (forward[0], weight.dense(), beside))
    assert not excess("nf4_linear", y, nf4_linear.reference_forward(*forward), truth)


def test_parts_cover_the_columns_and_fill_a_gpu(device: Any) -> None:
    for turns in (1, 7, 8, 16, 64, 224):
        for programs in (1, 16, 64, 448, 10_000):
            parts, each = nf4_gemm._parts(turns, programs, torch.device("cpu"))
            assert (parts - 1) * each < turns <= parts * each
            assert parts == 1 or (each >= nf4_gemm.TURNS and programs < nf4_gemm.PROGRAMS * 132)
    assert nf4_gemm._parts(224, 64, torch.device("cpu")) == (9, 25), "9 * 64 is at least 4 * 132"


def with_dequantised(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition."""
    return torch.nn.functional.linear(x, weight, bias)


def test_the_form_of_a_4_bit_product_is_the_chosen_one(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward through autograd, with and without dequantising first; odd widths always do."""
    taken: list[str] = []
    for name in ("product", "product_backward"):
        plain = getattr(nf4_linear, name)
        monkeypatch.setattr(nf4_linear, name, lambda *a, n=name, f=plain: (taken.append(n), f(*a))[1])
    for columns, form, expected in (
        (128, "fused", ["product", "product_backward"]),
        (128, "dequantise", []),
        (96, "fused", []),
    ):
        taken.clear()
        weight = nf4.quantise(torch.randn(10, columns, device=device), nested=True)
        x = torch.randn(3, columns, device=device, requires_grad=True)
        with tuning.trial_form("nf4_linear", form), tuning.trial_form("nf4_linear_backward", form):
            y = linear.linear(x, weight)
            (dx,) = torch.autograd.grad(y.sum(), x)
        assert taken == expected
        torch.testing.assert_close(y, x @ weight.dense().t())
        torch.testing.assert_close(dx, weight.dense().sum(0).expand(3, -1))
