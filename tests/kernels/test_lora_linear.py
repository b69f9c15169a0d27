"""Low-rank terms of one or several runs on a frozen product in C++."""

import pytest
import torch

from peftdyno.kernels.random import keep_mask

MODULES = {"one": ([0, 48], [8]), "two": ([16, 32, 32, 48], [4, 4]), "odd": ([0, 7, 30, 33], [3, 5])}


def bordered(weight: torch.Tensor, border: int) -> torch.Tensor:
    out, columns = weight.shape
    whole = torch.full((out + border, columns + border), float("nan"), dtype=weight.dtype)
    return whole[:out, :columns].copy_(weight)


def arguments(rows, dtype, runs, module, border, dropout, tokens=None):
    spans, ranks = MODULES[module]
    num_runs, n = len(runs) - 1, runs[-1]
    columns = 96
    x, weight = rows(n, columns, dtype, spare=border), bordered(rows(48, columns, dtype), border)
    a = [torch.randn(num_runs, r, columns) / 10 for r in ranks]
    b = [torch.randn(num_runs, spans[2 * m + 1] - spans[2 * m], r) for m, r in enumerate(ranks)]
    scaling = [0.5 + 0.25 * i for i in range(len(ranks) * num_runs)]
    streams = torch.randint(-(2**62), 2**62, (n,)) if dropout else None
    keys = torch.randint(-(2**62), 2**62, (len(ranks), num_runs)) if dropout else None
    return x, weight, a, b, (scaling, spans, list(runs), dropout, streams, keys), border


RUNS = {"one": [0, 63], "single": [0, 1], "empty": [0, 0, 5, 5, 65], "many": [0, 100, 100, 300]}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("border", [0, 32])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_runs(check, rows, dtype, runs, module, border, dropout) -> None:
    x, weight, a, b, terms, border = arguments(rows, dtype, runs, module, border, dropout)
    bias = torch.randn(48).to(dtype) if module == "two" else None
    y, u = check("lora_linear", x, weight, bias, a, b, *terms, border, border, 16)
    assert y.stride(0) == 48 + 16
    before = weight.clone(), x.clone()
    dy = rows(x.shape[0], 48, dtype, spare=border)
    for need_x in (True, False):
        check("lora_linear_backward", dy, x, u, weight, a, b, *terms, border, need_x)
    assert torch.equal(before[0], weight) and torch.equal(before[1], x), "the border's neighbours changed"


@pytest.mark.parametrize("threads_used", [1, 2])
def test_threads(check, rows, dtype, threads, threads_used) -> None:
    threads(threads_used)
    x, weight, a, b, terms, _ = arguments(rows, dtype, [0, 300, 513], "two", 32, 0.1)
    _, u = check("lora_linear", x, weight, None, a, b, *terms, 32, 32, 0)
    check("lora_linear_backward", rows(513, 48, dtype, spare=32), x, u, weight, a, b, *terms, 32, True)


@pytest.mark.parametrize("columns", [1, 7, 63, 127, 128, 576, 1001])
def test_mask_is_the_stream(isa, columns) -> None:
    """u = drop(1) A^T with A the identity shows the mask itself, element by element."""
    n, dropout = 5, 0.3
    streams, keys = torch.randint(-(2**62), 2**62, (n,)), torch.randint(-(2**62), 2**62, (1, 1))
    weight, x = torch.zeros(1, columns), torch.ones(n, columns)
    a, b = [torch.eye(columns)[None]], [torch.zeros(1, 1, columns)]
    _, u = torch.ops.peftdyno_cpu.lora_linear(
        x, weight, None, a, b, [1.0], [0, 1], [0, n], dropout, streams, keys, 0, 0, 0
    )
    assert torch.equal(u != 0, keep_mask(streams, columns, int(keys), dropout))


@pytest.mark.parametrize("runs", [[0, 40, 40, 57, 122], [0, 1, 33, 65, 66], [0, 700, 700, 701, 1420]])
def test_terms_join_panels(check, rows, dtype, runs) -> None:
    """Modules over several panels and strips of one weight, one of them beginning within a panel; runs of rows
    that pass by in one turn and in two."""
    n, columns, out = runs[-1], 576, 440
    x, weight, bias = rows(n, columns, dtype, spare=3), rows(out, columns, dtype), torch.randn(out).to(dtype)
    spans, ranks = [0, 170, 180, 440], [16, 40]
    a = [torch.randn(4, r, columns) / 25 for r in ranks]
    b = [torch.randn(4, spans[2 * m + 1] - spans[2 * m], r) for m, r in enumerate(ranks)]
    terms = [0.25 * (i + 1) for i in range(8)], spans, runs, 0.1, torch.arange(n), torch.ones(2, 4, dtype=torch.int64)
    _, u = check("lora_linear", x, weight, bias, a, b, *terms, 0, 0, 16)
    check("lora_linear_backward", rows(n, out, dtype), x, u, weight, a, b, *terms, 0, True)


def test_factors_of_runs_may_lie_apart(isa, rows) -> None:
    """As in a bank, where a run's parameters lie together."""
    x, weight = rows(70, 64, torch.float32), rows(48, 64, torch.float32)
    whole = torch.randn(2, 5 * 64 + 48 * 5)
    a, b = [whole[:, : 5 * 64].view(2, 5, 64)], [whole[:, 5 * 64 :].view(2, 48, 5)]
    terms = [1.0, 2.0], [0, 48], [0, 30, 70], 0.0, None, None, 0, 0, 0
    apart = torch.ops.peftdyno_cpu.lora_linear(x, weight, None, a, b, *terms)
    together = torch.ops.peftdyno_cpu.lora_linear(x, weight, None, [a[0].clone()], [b[0].clone()], *terms)
    assert all(map(torch.equal, apart, together))


def test_deep_gradient(check, rows, dtype) -> None:
    """The low-rank gradient of x and the large product's meet in one tensor, also where the product is ours."""
    tokens, out, columns = 400, 2080, 64
    x, weight = rows(tokens, columns, dtype), rows(out, columns, dtype)
    a, b = [torch.randn(2, 5, columns) / 10], [torch.randn(2, 100, 5)]
    terms = [0.5, 1.0], [700, 800], [0, 150, tokens], 0.1, torch.arange(tokens), torch.ones(1, 2, dtype=torch.int64)
    _, u = check("lora_linear", x, weight, None, a, b, *terms, 0, 0, 0)
    check("lora_linear_backward", rows(tokens, out, dtype), x, u, weight, a, b, *terms, 0, True)
