"""The fused product with a low-rank term, and 4-bit weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import nf4, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.triton import load, lora_gemm


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
