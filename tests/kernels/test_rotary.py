"""Rotary embedding in C++."""

import pytest
import torch

from peftdyno.kernels import rotary


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (63, 3, 10), (127, 12, 64), (0, 2, 8)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("threads_used", [1, 2])
def test_rotary(check, rows, dtype, threads, threads_used, tokens, heads, head_dim, inverse) -> None:
    threads(threads_used)
    qkv = rows(tokens, (heads + 2) * head_dim, dtype, spare=3)
    frequencies = 10000 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    cos, sin = rotary.angles(torch.arange(tokens) * 7, frequencies)
    check("rotary_", qkv, cos, sin, heads, inverse, changed=(0,))
