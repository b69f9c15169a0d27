"""RMS norm forward and backward in C++."""

import pytest
import torch


@pytest.mark.parametrize("width", [1, 63, 127, 576])
@pytest.mark.parametrize("with_residual", [False, True])
def test_runs(check, rows, dtype, runs, width, with_residual) -> None:
    n = runs[-1]
    x = rows(n, width, dtype, spare=3)
    residual = rows(n, width, dtype) if with_residual else None
    weight = torch.randn(len(runs) - 1, width)
    y, h, rstd = check("rms_norm", x, residual, weight, runs, 1e-5, 1.0, 8)
    assert y.stride(0) == width + 8
    dy, dh = rows(n, width, dtype, spare=5), rows(n, width, dtype) if with_residual else None
    for need_weight in (False, True):
        check("rms_norm_backward", dy, dh, h if with_residual else x, weight, rstd, runs, 1.0, need_weight)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_frozen_weight(check, rows, dtype, weight_dtype) -> None:
    x, weight = rows(33, 64, dtype), torch.randn(64).to(weight_dtype)
    _, _, rstd = check("rms_norm", x, None, weight, [], 1e-6, 0.0, 0)
    check("rms_norm_backward", rows(33, 64, dtype), None, x, weight, rstd, [], 0.0, True)


def test_extreme_values(check, dtype) -> None:
    x = torch.tensor([[3e18, -2e18, 1e18, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-20, -1e-20, 2e-20, 0.0]]).to(dtype)
    check("rms_norm", x, None, torch.ones(4), [], 1e-5, 0.0, 0)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_threads(check, rows, dtype, threads, threads_used) -> None:
    threads(threads_used)
    x, weight = rows(500, 200, dtype), torch.randn(2, 200)
    _, _, rstd = check("rms_norm", x, None, weight, [0, 311, 500], 1e-5, 0.0, 0)
    check("rms_norm_backward", rows(500, 200, dtype), None, x, weight, rstd, [0, 311, 500], 0.0, True)
