"""Norm and activation that also make x A^T: against the reference, and what they leave beside their result."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import glu, lora_linear, low_rank_input, rms_norm, tuning
from peftdyno.kernels.adapted_linear import LinearEdits, LowRank, TokenRuns
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.random import stream_key
from peftdyno.kernels.triton import load

CASES = [
    ([0, 1], 1, (1,), 0.0),
    ([0, 0, 30, 41], 63, (3, 20), 0.3),
    ([0, 5, 5, 36], 200, (4, 4, 9), 0.0),
    ([0, 17, 33], 136, (16, 48), 0.3),
]
"""Offsets of the runs, columns, ranks of the modules, dropout."""


def terms(runs: list[int], columns: int, ranks: tuple[int, ...], dropout: float, device: Any) -> list[Any]:
    """a, run_offsets, dropout, streams, keys; every factor lies among others, as in a bank."""
    count = len(runs) - 1
    a = [torch.randn(count, r * columns + 5, device=device)[:, 2:-3].view(count, r, columns) for r in ranks]
    keys = [[stream_key(7, f"m{m}", j) for j in range(count)] for m in range(len(a))]
    streams = torch.randint(2**45, (runs[-1],), device=device) if dropout else None
    return [a, runs, dropout, streams, torch.tensor(keys) if dropout else None]


def rows(n: int, columns: int, dtype: torch.dtype, device: Any, spare: int = 3) -> Tensor:
    like = torch.empty(0, dtype=dtype, device=device)
    return with_spare(n, columns, spare, like).copy_(torch.randn(n, columns))


def spread(u: Tensor, runs: list[int], ranks: tuple[int, ...]) -> Tensor:
    """u with each run's rows in columns of its own, module by module."""
    pieces = []
    for module in u.split(ranks, dim=1):
        for start, stop in itertools.pairwise(runs):
            own = torch.zeros_like(module)
            own[start:stop] = module[start:stop]
            pieces.append(own)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("runs", "columns", "ranks", "dropout"), CASES)
@pytest.mark.parametrize("kind", ["norm", "norm + residual", "silu", "gelu_tanh"])
def test_producers(
    kind: str, runs: list[int], columns: int, ranks: tuple[int, ...], dropout: float, dtype: torch.dtype, device: Any
) -> None:
    n, room = runs[-1], sum(ranks) * (len(runs) - 1)
    low = terms(runs, columns, ranks, dropout, device)
    arguments: tuple[Any, ...]
    if kind.startswith("norm"):
        x = rows(n, columns, dtype, device)
        residual = rows(n, columns, dtype, device) if "residual" in kind else None
        weight = torch.randn(columns, device=device).to(dtype)
        name, reference = "rms_norm_down", low_rank_input.reference_norm
        arguments = x, residual, weight, *low, 1e-5, 0.5, room + 2
    else:
        name, reference = "glu_down", low_rank_input.reference_glu
        arguments = rows(n, 2 * columns, dtype, device), kind, *low, room + 2
    found = load(name)(*arguments)
    lines = excess(name, found, reference(*arguments), in_float64(reference, arguments))
    assert not lines, lines
    y, u = found[0], found[-1]
    beside = y.as_strided((n, room), y.stride(), y.storage_offset() + columns)
    assert torch.equal(beside, spread(u, runs, ranks))


@pytest.mark.parametrize("room", [0, 3], ids=["plain", "bordered"])
def test_the_product_of_what_was_made(room: int, dtype: torch.dtype, device: Any) -> None:
    runs, columns, ranks, out = [0, 5, 5, 36], 40, (4, 9), 50
    border = room + sum(ranks) * 3 if room else 0
    storage = torch.full((out + border, columns + border), float("nan"), dtype=dtype, device=device)
    weight = storage[:out, :columns]
    weight.copy_(torch.randn(out, columns) / columns**0.5)
    u = rows(36, sum(ranks), dtype, device, 0)
    x = rows(36, columns, dtype, device, border)
    if border:
        x.as_strided((36, sum(ranks) * 3), x.stride(), columns).copy_(spread(u, runs, ranks))
    b = [
        torch.randn(3, stop - start, r, device=device)
        for r, (start, stop) in zip(ranks, ((0, 20), (25, 50)), strict=True)
    ]
    scaling = [0.1 + 0.2 * i for i in range(6)]
    arguments = (
        x,
        u,
        weight,
        torch.randn(out, device=device).to(dtype),
        b,
        scaling,
        [0, 20, 25, 50],
        runs,
        border,
        border,
        5,
    )
    y = load("lora_linear_up")(*arguments)
    truth = in_float64(lora_linear.reference_up, arguments)
    assert y.stride(0) == out + 5
    assert not excess("lora_linear_up", y, lora_linear.reference_up(*arguments), truth)


def test_both_ways_cost_the_same_work(device: Any) -> None:
    """FLOPs of every kind; the bytes are fewer, for the input is not read again."""
    a, runs, dropout, streams, keys = terms([0, 5, 36], 40, (4, 9), 0.3, device)
    x, gate_up, weight = (rows(*shape, torch.float32, device) for shape in ((36, 40), (36, 80), (50, 40)))
    b = [torch.randn(2, 25, r, device=device) for r in (4, 9)]
    places = [1.0] * 4, [0, 25, 25, 50], runs
    apart = lora_linear.forward_cost(x, weight, None, a, b, *places, dropout, streams, keys, 0, 0, 0)
    up = lora_linear.up_cost(x, x[:, :13], weight, None, b, *places, 0, 0, 0)
    norms = rms_norm.forward_cost(x, x, weight[0]), low_rank_input.norm_cost(x, x, weight[0], a, runs, dropout)
    gates = glu.forward_cost(gate_up, None, "silu"), low_rank_input.glu_cost(gate_up, "silu", a, runs, dropout)
    for plain, together in (norms, gates):
        for owner in ("base", "adapter"):
            whole, parts = getattr(plain, owner) + getattr(apart, owner), getattr(together, owner) + getattr(up, owner)
            for kind in ("matrix", "pointwise", "reduction"):
                assert getattr(whole, kind) == getattr(parts, kind), (owner, kind)


def test_taken_only_where_chosen_and_where_there_is_room(device: Any) -> None:
    a, b = torch.randn(2, 16, 40, device=device), torch.randn(2, 50, 16, device=device)

    def edits(count: int) -> LinearEdits:
        return LinearEdits(low_rank=(LowRank(start=0, stop=50, a=a, b=b, scaling=(1.0, 1.0)),) * count)

    def taken(count: int, spare: int) -> bool:
        x, runs = torch.empty(36, 40, device=device), TokenRuns(offsets=(0, 5, 36))
        return low_rank_input.down_of("glu_down", x, 40, spare, lambda: edits(count), runs) is not None

    assert not taken(1, 32), "the default is the product's own"
    with tuning.trial_form("glu_down", "together"):
        assert taken(1, 32) and taken(4, 128)
        assert not taken(1, 24) and not taken(1, 0), "no room beside y"
        assert not taken(5, 160), "more ranks than a kernel holds"
        assert not taken(0, 32), "nothing to make"
