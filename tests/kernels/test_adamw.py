"""AdamW on stacked runs in C++."""

import pytest
import torch


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (4, 5, 127), (2, 0), (2, 40000)])
def test_runs(check, shape) -> None:
    p, g, m = (torch.randn(*shape) for _ in range(3))
    v = torch.rand(*shape)
    steps = [0 if j == 1 else 1 + 400 * j for j in range(shape[0])]
    rates, clips = [1e-3 * (j + 1) for j in range(shape[0])], [0.5**j for j in range(shape[0])]
    after = check("adamw_", p, g, m, v, rates, clips, steps, 0.9, 0.999, 1e-8, 0.01, changed=(0, 2, 3))
    if shape[0] > 1:
        assert torch.equal(after[0][1], p[1]), "a run without a step changed"


@pytest.mark.parametrize("threads_used", [1, 2])
def test_runs_that_lie_apart(check, threads, threads_used) -> None:
    """A group of the parameters of a bank whose others have another rate."""
    threads(threads_used)
    p, g, m, v = (torch.rand(3, 20000)[:, 5:17000] for _ in range(4))
    check("adamw_", p, g, m, v, [1e-3] * 3, [1.0] * 3, [1, 0, 7], 0.9, 0.999, 1e-8, 0.01, changed=(0, 2, 3))


def test_zero_gradients(check) -> None:
    p, zero = torch.randn(1, 50), torch.zeros(1, 50)
    check("adamw_", p, zero, zero, zero, [1e-3], [1.0], [1], 0.9, 0.999, 1e-8, 0.1, changed=(0, 2, 3))
