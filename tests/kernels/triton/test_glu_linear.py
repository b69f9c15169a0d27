"""The gated activation and the adapted product that reads it, as one: gradients, what is kept, and when it is taken."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import glu, glu_linear, linear, lora_linear, tuning
from peftdyno.kernels.adapted_linear import Columns, LinearEdits, LowRank, TokenRuns, adapted_linear
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.random import stream_key
from peftdyno.kernels.triton import glu_lora, load

CASES = [
    ([0, 1], 1, 1, 0.0, "silu"),
    ([0, 0, 30, 41], 63, 3, 0.3, "silu"),
    ([0, 5, 5, 36], 200, 16, 0.0, "gelu_tanh"),
    ([0, 17, 33], 136, 20, 0.3, "gelu_tanh"),
    ([0, 33], 24, 64, 0.3, "silu"),
]
"""Offsets of the runs, columns, rank, dropout, activation."""
OUT = 30


def terms(runs: list[int], columns: int, rank: int, dropout: float, device: Any) -> list[Any]:
    """a, b, scaling, rows, run_offsets, dropout, streams, keys; the module is on some rows of W."""
    count = len(runs) - 1
    a, b = torch.randn(count, rank, columns, device=device), torch.randn(count, 20, rank, device=device)
    scaling = [0.3 + 0.2 * j for j in range(count)]
    streams = torch.randint(2**45, (runs[-1],), device=device) if dropout else None
    keys = torch.tensor([[stream_key(7, "down", j) for j in range(count)]]) if dropout else None
    return [[a], [b], scaling, [5, 25], runs, dropout, streams, keys]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("runs", "columns", "rank", "dropout", "activation"), CASES)
def test_backward(
    runs: list[int], columns: int, rank: int, dropout: float, activation: str, large: bool, dtype: torch.dtype,
    device: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(glu_lora, "CHUNK", 16)  # so that several parts of a run are summed
    n = runs[-1]
    if rank > glu_linear.MOST_RANKS[dtype.itemsize]:
        pytest.skip("more ranks than a kernel holds")
    gate_up = torch.randn(n, 2 * columns, device=device)
    gate_up[:, :columns] *= 40.0 if large else 1.0
    shared = terms(runs, columns, rank, dropout, device)
    dx, dy, u = (torch.randn(n, width, device=device).to(dtype) for width in (columns, OUT, rank))
    arguments = dx, dy, gate_up.to(dtype), u, *shared, activation, 3
    name, reference = "glu_lora_backward", glu_linear.reference_backward
    found = load(name)(*arguments)
    lines = excess(name, found, reference(*arguments), in_float64(reference, arguments))
    assert not lines, lines
    assert found[0].stride(0) == 2 * columns + 3


def edits_of(shared: list[Any], **more: Any) -> LinearEdits:
    a, b, scaling, (start, stop), _, dropout, _, keys = shared
    term = LowRank(start=start, stop=stop, a=a[0].requires_grad_(), b=b[0].requires_grad_(), scaling=tuple(scaling))
    return LinearEdits(**{"low_rank": (term,), "dropout": dropout, "keys": keys, **more})


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_one_and_apart(dropout: float, device: Any, triton_kernels: None) -> None:
    """The same value and gradients; gate_up and u are kept, the activation's result is not."""
    runs, columns, rank = [0, 5, 5, 36], 40, 9
    shared = terms(runs, columns, rank, dropout, device)
    edits, token_runs = edits_of(shared), TokenRuns(offsets=tuple(runs), streams=shared[6])
    weight = torch.randn(OUT, columns, device=device) / columns**0.5
    gate_up = torch.randn(36, 2 * columns, device=device, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def values(as_one: bool) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
            if as_one:
                y = glu_linear.glu_linear(gate_up, "silu", weight, edits, token_runs, grad_spare=2)
            else:
                y = adapted_linear(glu.glu(gate_up, "silu"), weight, None, edits, token_runs)
            loss = y.square().sum()
        return [y.detach(), *torch.autograd.grad(loss, [gate_up, *edits.parameters])]

    apart = values(False)
    kept.clear()
    for found, expected in zip(values(True), apart, strict=True):
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert (36, columns) not in kept and {(36, 2 * columns), (36, rank)} <= set(kept)


def test_costs_are_those_of_both(device: Any) -> None:
    """And the activation's own product once more, for dA."""
    runs, columns, rank = [0, 5, 5, 36], 40, 9
    shared = terms(runs, columns, rank, 0.3, device)
    dx, dy, u, gate_up, weight = (torch.randn(*s) for s in ((36, 40), (36, OUT), (36, 9), (36, 80), (OUT, 40)))
    product = lora_linear.backward_cost(dy, dx, u, weight, *shared, 0, True)
    gate, frozen = glu.backward_cost(dx, gate_up, None, "silu").base, linear.backward_cost(dy, weight).base
    found = glu_linear.backward_cost(dx, dy, gate_up, u, *shared, "silu", 0)
    assert (found.base + frozen).matrix == product.base.matrix and found.base.pointwise == gate.pointwise
    assert found.adapter.matrix == product.adapter.matrix
    assert found.adapter.pointwise == product.adapter.pointwise + dx.numel()


def test_taken_where_one_low_rank_term_learns(device: Any, triton_kernels: None) -> None:
    shared = terms([0, 5, 36], 40, 9, 0.0, device)
    gate_up = torch.randn(36, 80, device=device, requires_grad=True)

    def taken(rows: Tensor = gate_up, **more: Any) -> bool:
        return glu_linear.joined(rows, lambda: edits_of(shared, **more)) is not None

    assert taken()
    assert not taken(gate_up.detach()), "no gradient to make"
    assert not taken(low_rank=()) and not taken(low_rank=edits_of(shared).low_rank * 2)
    assert not taken(shifts=(Columns(start=0, values=torch.zeros(2, 4)),))
    with torch.no_grad():
        assert not taken()
    with tuning.trial_form("glu_lora_backward", "apart"):
        assert not taken()


def test_left_to_others_on_a_cpu(device: Any) -> None:
    """Its own kernels read the product's input."""
    gate_up = torch.randn(36, 80, requires_grad=True)
    assert glu_linear.joined(gate_up, lambda: pytest.fail("asked for the edits")) is None
