"""Gated activations forward and backward in C++."""

import pytest
import torch


@pytest.mark.parametrize("width", [1, 63, 127, 320])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_runs(check, rows, dtype, runs, width, activation) -> None:
    gate_up, dy = rows(runs[-1], 2 * width, dtype, spare=2), rows(runs[-1], width, dtype, spare=1)
    for scale in (None, torch.randn(len(runs) - 1, width)):
        y = check("glu", gate_up, scale, activation, runs, 4)
        assert y.stride(0) == width + 4
        dx, _ = check("glu_backward", dy, gate_up, scale, activation, runs, 6)
        assert dx.stride(0) == 2 * width + 6


@pytest.mark.parametrize("gate", [-1e30, -200.0, -89.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 89.0, 200.0, 1e15, 1e30])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_extreme_values(check, activation, gate) -> None:
    """One at a time: beside a large one no error of a small one is seen. Below 1e-34 nobody tells a result from 0."""
    gates = torch.tensor([[gate, 1.0] if -1e3 < gate < -87 else [gate]])
    gate_up = torch.cat([gates, torch.ones_like(gates)], dim=1)
    check("glu", gate_up, None, activation, [0, 1], 0)
    check("glu_backward", torch.ones_like(gates), gate_up, None, activation, [0, 1], 0)


def test_a_scale_of_another_width(isa) -> None:
    with pytest.raises(RuntimeError, match=r"\[2, 5\] does not hold a vector of 4 a run"):
        torch.ops.peftdyno_cpu.glu(torch.ones(3, 8), torch.ones(2, 5), "silu", [0, 1, 3], 0)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_threads(check, rows, dtype, threads, threads_used) -> None:
    threads(threads_used)
    gate_up, dy, scale = rows(300, 512, dtype), rows(300, 256, dtype), torch.randn(2, 256)
    check("glu", gate_up, scale, "silu", [0, 100, 300], 0)
    check("glu_backward", dy, gate_up, scale, "silu", [0, 100, 300], 0)
