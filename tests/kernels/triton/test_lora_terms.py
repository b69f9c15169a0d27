"""Low-rank terms beside a product with a weight in 4 bits: the same as on the dequantised weight, never made dense."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import dispatch, lora_linear, lora_terms, nf4, tuning
from peftdyno.kernels.adapted_linear import LinearEdits, LowRank, TokenRuns, adapted_linear
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.random import stream_key
from peftdyno.kernels.triton import load

RUNS, COLUMNS, OUT, RANKS, ROWS = [0, 5, 5, 36], 64, 50, (3, 17), [0, 20, 25, 50]


def terms(dropout: float, device: Any) -> list[Any]:
    """a, b, scaling, rows, run_offsets, dropout, streams, keys."""
    a = [torch.randn(3, r, COLUMNS, device=device) for r in RANKS]
    b = [torch.randn(3, out, r, device=device) for r, out in zip(RANKS, (20, 25), strict=True)]
    keys = [[stream_key(7, f"m{m}", j) for j in range(3)] for m in range(2)]
    streams = torch.randint(2**45, (RUNS[-1],), device=device) if dropout else None
    return [
        a,
        b,
        [0.1 + 0.2 * i for i in range(6)],
        ROWS,
        RUNS,
        dropout,
        streams,
        torch.tensor(keys) if dropout else None,
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_terms(dropout: float, dtype: torch.dtype, device: Any) -> None:
    """Added to what is there, in both directions."""
    shared = terms(dropout, device)
    y, x, dy, dx = (torch.randn(36, n, device=device).to(dtype) for n in (OUT, COLUMNS, OUT, COLUMNS))

    def both(add: Any, y: Tensor, x: Tensor, *shared: Any) -> list[Tensor]:
        target = y.clone()
        return [add(target, x, *shared), target]

    name, reference = "lora_terms_", lora_terms.reference_add
    found = both(load(name), y, x, *shared)
    truth = in_float64(lambda *given: both(reference, *given), (y, x, *shared))
    assert not excess(name, found, both(reference, y, x, *shared), truth)

    def backward(add: Any, dx: Tensor, *given: Any) -> list[Any]:
        target = dx.clone()
        return [add(target, *given), target]

    name, reference = "lora_terms_backward_", lora_linear.add_backward
    for need_x in (True, False):
        given = (dx, dy, x, found[0], *shared, need_x)
        truth = in_float64(lambda *given: backward(reference, *given), given)
        assert not excess(name, backward(load(name), *given), backward(reference, *given), truth)


def test_costs_are_those_of_the_whole_product(device: Any) -> None:
    shared = terms(0.3, device)
    x, y, weight, u = (torch.randn(*shape) for shape in ((36, COLUMNS), (36, OUT), (OUT, COLUMNS), (36, sum(RANKS))))
    whole = lora_linear.forward_cost(x, weight, None, *shared, 0, 0, 0).adapter
    own = lora_terms.forward_cost(y, x, *shared).adapter
    assert (whole.matrix, whole.pointwise) == (own.matrix, own.pointwise)
    for need_x in (True, False):
        whole = lora_linear.backward_cost(y, x, u, weight, *shared, 0, need_x).adapter
        own = lora_terms.backward_cost(x, y, x, u, *shared, need_x).adapter
        assert (whole.matrix, whole.pointwise) == (own.matrix, own.pointwise)


@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_weight_in_4_bits_is_never_made_dense(
    kernels: str, dropout: float, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, scaling, rows, runs, _, streams, keys = terms(dropout, device)
    weight = nf4.quantise(torch.randn(OUT, COLUMNS, device=device))
    low = [
        LowRank(start=rows[2 * m], stop=rows[2 * m + 1], a=f.requires_grad_(), b=g.requires_grad_(), scaling=tuple(s))
        for m, (f, g, s) in enumerate(zip(a, b, (scaling[:3], scaling[3:]), strict=True))
    ]
    edits = LinearEdits(low_rank=tuple(low), dropout=dropout, keys=keys)
    x = torch.randn(36, COLUMNS, device=device, requires_grad=True)
    bias = torch.randn(OUT, device=device)

    def values(w: Any) -> list[Tensor]:
        y = adapted_linear(x, w, bias, edits, TokenRuns(offsets=tuple(runs), streams=streams), spare=3)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *a, *b])]

    before = dispatch.current()
    dispatch.use(kernels)
    try:
        expected = values(weight.dense())
        monkeypatch.setattr(nf4.Nf4Weight, "dense", lambda self: pytest.fail("made dense"))
        with tuning.trial_form("nf4_linear", "fused"), tuning.trial_form("nf4_linear_backward", "fused"):
            found = values(weight)
    finally:
        dispatch.use(before)
    for value, truth in zip(found, expected, strict=True):
        assert float((value - truth).norm()) <= 1e-5 * float(truth.norm())
