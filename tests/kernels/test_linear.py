"""Frozen products on strided rows in C++."""

import pytest
import torch


@pytest.mark.parametrize(("tokens", "out", "columns"), [(1, 1, 1), (63, 127, 64), (127, 96, 63)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_strides(check, rows, dtype, tokens, out, columns, with_bias) -> None:
    x, weight = rows(tokens, columns, dtype, spare=5), rows(out, columns, dtype, spare=8)
    y = check("linear", x, weight, torch.randn(out).to(dtype) if with_bias else None, 16)
    assert y.stride(0) == out + 16
    check("linear_backward", rows(tokens, out, dtype, spare=3), weight)
