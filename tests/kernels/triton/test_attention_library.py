"""A library's attention: taken where chosen and where a pack allows it. The libraries run on GPUs alone, so a stand-in
computes for them here; that PyTorch's operators take these arguments is checked on shapes."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.engine.pack import Sequence, build_pack
from peftdyno.kernels import attention, tuning
from peftdyno.kernels.triton import attention_library as library
from peftdyno.kernels.triton import load

LENGTHS = [5, 1, 17]
HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def operands(layout: attention.AttentionLayout, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    n = int(layout.segments[:, 1].sum())
    qkv = torch.randn(n, HEADS + 2 * KEY_HEADS, WIDTH).to(dtype)
    return qkv.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)


def layout_of(share: bool = False, lengths: list[int] = LENGTHS) -> attention.AttentionLayout:
    sequences = [Sequence(tokens=(7, *range(10, 9 + n)), num_prompt=1, ordinal=i) for i, n in enumerate(lengths)]
    return build_pack(sequences, share_prefix=share).layout


def by_segments(call: library.Call, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The tables that a library's sequences stand for."""
    spans = list(itertools.pairwise(call.sequences.cu.tolist()))
    segments = torch.tensor([[a, b - a, i, i + 1] for i, (a, b) in enumerate(spans)], dtype=torch.int32)
    return segments, torch.tensor([[a, b - a, 0] for a, b in spans], dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A stand-in for the libraries, and the calls it got."""
    made: list[str] = []

    def forward(name: str) -> Any:
        def run(call: library.Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            made.append(name)
            assert call.sequences.longest == max(call.sequences.cu.diff())
            options = (None, None, *by_segments(call), call.scale, call.left + 1, 0.0, 0)
            out, lse = attention.reference_forward(q, k, v, *options)
            return out.unflatten(1, q.shape[1:]), lse

        return run

    def backward(call: library.Call, dout: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> Any:
        made.append("backward")
        options = (None, None, out.flatten(1), lse, *by_segments(call), call.scale, call.left + 1, 0.0, 0)
        dqkv, _, _ = attention.reference_backward(dout.flatten(1), q, k, v, *options)
        return [t.contiguous() for t in dqkv.unflatten(1, (HEADS + 2 * KEY_HEADS, WIDTH)).split([4, 2, 2], dim=1)]

    monkeypatch.setattr(library, "torch_forward", forward("varlen"))
    monkeypatch.setattr(library, "flash_attn_forward", forward("flash-attn"))
    monkeypatch.setattr(library, "torch_backward", backward)
    monkeypatch.setattr(library, "runnable", lambda operator, device: tuning.FORMS[operator])
    yield made


@pytest.mark.parametrize("form", ["varlen", "flash-attn"])
@pytest.mark.parametrize("window", [0, 3])
def test_both_directions(form: str, window: int, calls: list[str]) -> None:
    layout = layout_of()
    q, k, v = operands(layout)
    tables = layout.segments, layout.chain
    options = (None, None, *tables, 0.25, window, 0.0, 8)
    with tuning.trial_form("attention", form), tuning.trial_form("attention_backward", "varlen"):
        out, lse = load("attention")(q, k, v, *options)
        dout = torch.randn(out.shape).half()
        found = load("attention_backward")(dout, q, k, v, None, None, out, lse, *options[2:])
    assert calls == [form, "backward"]
    assert out.stride(0) == HEADS * WIDTH + 8 and found[0].stride(0) == (HEADS + 2 * KEY_HEADS) * WIDTH + 8
    expected = attention.reference_forward(q, k, v, *options)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    plain = attention.reference_backward(dout, q, k, v, None, None, *expected, *options[2:])
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(found, plain, strict=True))


def test_our_kernels_run_where_no_library_serves(calls: list[str]) -> None:
    """A shared prefix, a learned one, capped scores, float32, odd heads, rows between sequences; and by default."""
    plain, shared = layout_of(), layout_of(share=True, lengths=[5, 17])
    prefix = torch.randn(2, KEY_HEADS, WIDTH).half()
    q, k, v = operands(plain)
    tables = plain.segments, plain.chain
    gap = plain.segments.clone()
    gap[-1, 1] -= 1

    def chosen(*given: Any) -> bool:
        return library.chosen("attention", *given) is not None

    assert not chosen((q, k, v), None, tables, (0.25, 0, 0.0)), "the default"
    with tuning.trial_form("attention", "varlen"):
        assert chosen((q, k, v), None, tables, (0.25, 0, 0.0))
        assert not chosen((q, k, v), prefix, tables, (0.25, 0, 0.0))
        assert not chosen((q, k, v), None, tables, (0.25, 0, 30.0))
        assert not chosen(tuple(t.float() for t in (q, k, v)), None, tables, (0.25, 0, 0.0))
        assert not chosen(tuple(t[..., :12] for t in (q, k, v)), None, tables, (0.25, 0, 0.0))
        assert not chosen((q, k, v), None, (gap, plain.chain), (0.25, 0, 0.0))
        assert not chosen(operands(shared), None, (shared.segments, shared.chain), (0.25, 0, 0.0))
    assert not calls


def test_a_library_that_is_not_there_gives_way() -> None:
    layout = layout_of()
    q, k, v = operands(layout)
    options = (None, None, layout.segments, layout.chain, 0.25, 0, 0.0, 0)
    expected, _ = load("attention")(q, k, v, *options)
    with tuning.trial_form("attention", "varlen"):
        out, _ = load("attention")(q, k, v, *options)
    if not torch.cuda.is_available():
        assert torch.equal(out, expected)


@pytest.mark.parametrize("left", [-1, 2])
def test_pytorch_takes_the_arguments(left: int) -> None:
    """Its operators on the meta device: shapes of the results, and that no name or place of an argument is wrong."""
    layout = layout_of()
    q, k, v = (t.to("meta") for t in operands(layout, torch.bfloat16))
    cu = torch.tensor([0, 5, 6, 23], dtype=torch.int32, device="meta")
    call = library.Call("varlen", library.Sequences(cu, 17), 0.25, left)
    out, lse = library.torch_forward(call, q, k, v)
    assert out.shape == q.shape and lse.shape == (HEADS, q.shape[0]) and lse.dtype == torch.float32
    gradients = library.torch_backward(call, torch.empty_like(out), out, q, k, v, lse)
    assert [t.shape for t in gradients] == [t.shape for t in (q, k, v)]
