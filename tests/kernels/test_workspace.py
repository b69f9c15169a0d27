"""The workspace that the compiled kernels state, against what the allocator handed out."""

import pytest
import torch

from peftdyno.kernels import cpu, memory
from peftdyno.kernels.oracle import flat
from peftdyno.kernels.workspace import cpu_workspace, own_product

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ kernels are not built")

VIEW = 64
"""Bytes of the small change that a library call may allocate: a scalar, an index."""


def recorded(operator: str, *arguments: object) -> int:
    """Bytes at the peak beside the results, which hold their storage to the end."""
    function = getattr(torch.ops.peftdyno_cpu, operator)
    function(*arguments)
    with memory.AllocatorPeak() as allocator:
        results = function(*arguments)
    return allocator.peak_bytes - sum(t.untyped_storage().nbytes() for t in flat(results))


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_attention(rows, threads, threads_used, backward) -> None:
    threads(threads_used)
    n, heads, key_heads, width = 300, 6, 3, 40
    q, k, v = (rows(n, h * width, torch.float32).unflatten(1, (h, width)) for h in (heads, key_heads, key_heads))
    segments = torch.tensor([[0, 200, 0, 1], [200, 100, 1, 3]], dtype=torch.int32)
    chain = torch.tensor([[0, 200, 0], [0, 200, 0], [200, 100, 200]], dtype=torch.int32)
    options = segments, chain, 0.2, 0, 0.0, 0
    arguments: tuple[object, ...] = (q, k, v, None, None, *options)
    if backward:
        out, lse = torch.ops.peftdyno_cpu.attention(*arguments)
        arguments = (torch.randn_like(out), q, k, v, None, None, out, lse, *options)
    name = "attention_backward" if backward else "attention"
    assert recorded(name, *arguments) == pytest.approx(cpu_workspace(name, arguments).otherwise, abs=VIEW)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_attention_of_single_queries(isa, rows, threads, threads_used) -> None:
    """It lays out no keys."""
    threads(threads_used)
    q, k, v = (rows(n, h * 40, torch.bfloat16).unflatten(1, (h, 40)) for n, h in ((9, 6), (300, 3), (300, 3)))
    segments = torch.tensor([[i, 1, i, i + 1] for i in range(9)], dtype=torch.int32)
    chain = torch.tensor([[30 * i, 30, 0] for i in range(9)], dtype=torch.int32)
    arguments = (q, k, v, None, None, segments, chain, 0.2, 0, 0.0, 0)
    assert recorded("attention", *arguments) == pytest.approx(cpu_workspace("attention", arguments).otherwise, abs=VIEW)


@pytest.mark.parametrize("tokens", [70, 300])
@pytest.mark.parametrize("border", [0, 32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_linear(rows, threads, tokens, border, dropout) -> None:
    """Products in fp32 need no scratch of the library, so the larger of the two figures is the peak."""
    threads(2)
    x, weight = rows(tokens, 96, torch.float32, spare=border), rows(48 + border, 96 + border, torch.float32)[:48, :96]
    a, b = [torch.randn(2, 5, 96)], [torch.randn(2, 48, 5)]
    streams, keys = torch.arange(tokens), torch.ones(1, 2, dtype=torch.int64)
    terms = [1.0, 2.0], [0, 48], [0, 30, tokens], dropout, streams, keys
    forward = x, weight, None, a, b, *terms, border, border, 0
    held = cpu_workspace("lora_linear", forward)
    assert recorded("lora_linear", *forward) == pytest.approx(max(held.during_products, held.otherwise), abs=VIEW)

    _, u = torch.ops.peftdyno_cpu.lora_linear(*forward)
    backward = rows(tokens, 48, torch.float32), x, u, weight, a, b, *terms, border, True
    held = cpu_workspace("lora_linear_backward", backward)
    peak = max(held.during_products, held.otherwise)
    assert recorded("lora_linear_backward", *backward) == pytest.approx(peak, abs=VIEW)


@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "depth", "columns"), [(1, 64, 40), (122, 576, 1100), (530, 1536, 72), (1100, 1568, 72), (400, 2080, 72)]
)
def test_products(isa, rows, threads, threads_used, tokens, depth, columns) -> None:
    """Of ours; the library states no scratch."""
    threads(threads_used)
    x, weight, other = (rows(*shape, torch.bfloat16) for shape in ((tokens, depth), (columns, depth), (depth, columns)))
    if own_product(x, columns) is None:
        pytest.skip("the library multiplies")
    for name, right, options in (("linear", weight, (None, 0)), ("linear_backward", other, ())):
        held = cpu_workspace(name, (x, right, *options)).otherwise
        assert recorded(name, x, right, *options) == pytest.approx(held, abs=VIEW)


def test_terms_in_a_product(isa, rows, threads) -> None:
    """Low-rank terms of runs whose factors lie apart, joining products of ours where there are such."""
    threads(2)
    x, weight, dy = (rows(*shape, torch.bfloat16) for shape in ((300, 64), (320, 64), (300, 320)))
    if own_product(x, 320) is None:
        pytest.skip("the library multiplies")
    whole = torch.randn(2, 16 * 64 + 160 * 16)
    a, b = [whole[:, : 16 * 64].view(2, 16, 64)], [whole[:, 16 * 64 :].view(2, 160, 16)]
    terms = [1.0, 2.0], [0, 160], [0, 90, 300], 0.1, torch.arange(300), torch.ones(1, 2, dtype=torch.int64)
    forward = x, weight, None, a, b, *terms, 0, 0, 0
    _, u = torch.ops.peftdyno_cpu.lora_linear(*forward)
    for name, arguments in (
        ("lora_linear", forward),
        ("lora_linear_backward", (dy, x, u, weight, a, b, *terms, 0, True)),
    ):
        held = cpu_workspace(name, arguments)
        peak = max(held.during_products, held.otherwise)
        assert recorded(name, *arguments) == pytest.approx(peak, abs=VIEW)
