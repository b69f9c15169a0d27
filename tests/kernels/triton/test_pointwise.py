"""Kernels that read each element once: against the reference's own error, forward and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import adamw, bank_affine, glu, label_loss, picked_rows, rms_norm, rotary
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.triton import load

ONE, FIRST_EMPTY, MIDDLE_EMPTY = [0, 1], [0, 0, 30, 63], [0, 5, 5, 126, 127]
"""Rows of the runs: one row; an empty first run; an empty run between two others."""
FP32, FP16 = torch.float32, torch.float16
"""Dtypes that the interpreter computes correctly."""


def random(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device, spare: int = 0) -> Tensor:
    x = with_spare(shape[0], shape[1], spare, torch.empty(0, dtype=dtype, device=device)) if len(shape) == 2 else None
    fresh = torch.randn(*shape, device=device).to(dtype)
    return fresh if x is None else x.copy_(fresh)


def stacked(runs: list[int], columns: int, device: torch.device) -> Tensor:
    """Parameters [R, columns] as they lie in a bank: each run's among those of other modules."""
    return torch.randn(len(runs) - 1, columns + 9, device=device)[:, 4 : columns + 4]


def check(name: str, reference: Callable[..., Any], *arguments: Any) -> Any:
    result = load(name)(*arguments)
    lines = excess(name, result, reference(*arguments), in_float64(reference, arguments))
    assert not lines, lines
    return result


def in_place(function: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """The same on copies of its first arguments, which it returns."""

    def run(*arguments: Any) -> list[Tensor]:
        copies = [t.clone() for t in arguments[:count]]
        function(*copies, *arguments[count:])
        return copies

    return run


def check_in_place(name: str, reference: Callable[..., Any], count: int, *arguments: Any) -> None:
    truth = in_float64(in_place(reference, count), arguments)
    plain = in_place(reference, count)(*arguments)
    lines = excess(name, in_place(load(name), count)(*arguments), plain, truth)
    assert not lines, lines


@pytest.mark.parametrize(
    ("runs", "columns", "with_residual", "dtype"),
    [
        (ONE, 1, False, FP32),
        (ONE, 200, True, FP16),
        (FIRST_EMPTY, 63, True, FP32),
        (MIDDLE_EMPTY, 63, False, FP16),
        (MIDDLE_EMPTY, 200, True, FP32),
    ],
)
def test_rms_norm(runs: list[int], columns: int, with_residual: bool, dtype: torch.dtype, device: Any) -> None:
    n = runs[-1]
    x = random(n, columns, dtype=dtype, device=device, spare=3)
    residual = random(n, columns, dtype=dtype, device=device) if with_residual else None
    for weight, offset in ((stacked(runs, columns, device), 0.0), (x[0].clone(), 1.0)):
        y, h, rstd = check("rms_norm", rms_norm.reference_forward, x, residual, weight, runs, 1e-5, offset, 8)
        assert y.stride(0) == columns + 8
        dy, dh = (random(n, columns, dtype=dtype, device=device, spare=5) for _ in range(2))
        arguments = dy, dh if with_residual else None, h if with_residual else x, weight, rstd, runs, offset
        check("rms_norm_backward", rms_norm.reference_backward, *arguments, True)
    check("rms_norm_backward", rms_norm.reference_backward, *arguments, False)


@pytest.mark.parametrize(
    ("runs", "width", "activation", "dtype"),
    [
        (ONE, 1, "silu", FP32),
        (FIRST_EMPTY, 63, "silu", FP16),
        (FIRST_EMPTY, 127, "gelu_tanh", FP32),
        (MIDDLE_EMPTY, 63, "gelu_tanh", FP16),
    ],
)
def test_glu(runs: list[int], width: int, activation: str, dtype: torch.dtype, device: Any) -> None:
    gate_up = random(runs[-1], 2 * width, dtype=dtype, device=device, spare=2)
    dy = random(runs[-1], width, dtype=dtype, device=device, spare=1)
    for scale in (None, stacked(runs, width, device)):
        check("glu", glu.reference_forward, gate_up, scale, activation, runs, 4)
        check("glu_backward", glu.reference_backward, dy, gate_up, scale, activation, runs, 4)


def test_gelu_is_finite_far_out(device: Any) -> None:
    gate_up = torch.tensor([[-90.0, 90.0, 1.0, 1.0]], device=device)
    check("glu", glu.reference_forward, gate_up, None, "gelu_tanh", [0, 1], 0)
    check("glu_backward", glu.reference_backward, gate_up[:, 2:], gate_up, None, "gelu_tanh", [0, 1], 0)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "inverse", "dtype"),
    [(1, 1, 2, False, FP32), (63, 3, 10, True, FP32), (127, 11, 16, False, FP16)],
)
def test_rotary(tokens: int, heads: int, head_dim: int, inverse: bool, dtype: torch.dtype, device: Any) -> None:
    qkv = random(tokens, (heads + 2) * head_dim, dtype=dtype, device=device, spare=3)
    frequencies = 10000 ** -(torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    cos, sin = rotary.angles(torch.arange(tokens, device=device) * 7, frequencies)
    check_in_place("rotary_", rotary.reference, 1, qkv, cos, sin, heads, inverse)


@pytest.mark.parametrize(
    ("runs", "column", "width", "dtype"),
    [(ONE, 0, 1, FP32), (FIRST_EMPTY, 5, 63, FP16), (MIDDLE_EMPTY, 0, 600, FP32)],
)
def test_bank_affine(runs: list[int], column: int, width: int, dtype: torch.dtype, device: Any) -> None:
    y = random(runs[-1], column + width + 4, dtype=dtype, device=device)
    values = stacked(runs, width, device)
    check_in_place("bank_scale_", bank_affine.reference_scale, 1, y, values, column, runs)
    check_in_place("bank_shift_", bank_affine.reference_shift, 1, y, values, column, runs)
    before = random(runs[-1], width, dtype=dtype, device=device, spare=3)
    for factor in (None, before):
        check("bank_column_sums", bank_affine.reference_column_sums, y, factor, column, width, runs)


@pytest.mark.parametrize(
    ("labels", "vocabulary", "softcap", "dtype"),
    [(1, 3, 0.0, FP32), (1, 5000, 30.0, FP32), (20, 1000, 0.0, FP16), (20, 127, 30.0, FP32)],
)
def test_label_loss(labels: int, vocabulary: int, softcap: float, dtype: torch.dtype, device: Any) -> None:
    x = random(labels, 48, dtype=dtype, device=device, spare=4)
    head = random(vocabulary, 48, dtype=dtype, device=device)
    targets = torch.randint(vocabulary, (labels,), device=device)
    for gradient in (False, True):
        check("label_loss", label_loss.reference, x, head, targets, softcap, gradient)
    reference = label_loss.SCALE_ROWS.implementations["reference"]
    check("scale_rows", reference, x, random(labels, device=device))


def test_label_loss_in_chunks(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    from peftdyno.kernels.triton import label_loss as triton_loss

    monkeypatch.setattr(triton_loss, "chunk_rows", lambda head: 10)
    x, head = random(23, 16, device=device), random(5000, 16, device=device)
    check("label_loss", label_loss.reference, x, head, torch.randint(5000, (23,), device=device), 0.0, True)


@pytest.mark.parametrize(
    ("index", "num_rows", "columns", "dtype"),
    [
        ([0], 1, 1, FP32),
        ([], 3, 5, FP32),
        ([4, 0, 4, 2, 4, 4, 4, 4, 4, 2], 6, 63, FP16),
        ([*range(63), *range(63), 5], 127, 600, FP32),
    ],
)
def test_picked_rows(index: list[int], num_rows: int, columns: int, dtype: torch.dtype, device: Any) -> None:
    """Rows picked never, once, and more often than a program adds at a time."""
    picks = torch.tensor(index, dtype=torch.int64, device=device)
    dy = random(len(index), columns, dtype=dtype, device=device, spare=3)
    check("picked_rows_backward", picked_rows.reference_backward, dy, picks, num_rows, False)


def test_adamw_leaves_other_runs_alone(device: Any) -> None:
    runs, width = 3, 2500
    storage = [torch.randn(runs, width + 7, device=device) for _ in range(4)]
    p, g, m, v = (t[:, 3 : 3 + width] for t in storage)
    v.abs_()
    options = ([1e-3, 2e-2, 0.0], [1.0, 0.3, 1.0], [1, 400, 0], 0.9, 0.999, 1e-8, 0.1)

    def update(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
        def run(p: Tensor, m: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
            copies = [p.clone(), m.clone(), v.clone()]
            function(copies[0], g.to(p.dtype), *copies[1:], *rest)
            return copies

        return run

    truth = in_float64(update(adamw.reference), (p, m, v, *options))
    found, plain = (update(f)(p, m, v, *options) for f in (load("adamw_"), adamw.reference))
    assert not excess("adamw_", found, plain, truth)
    assert all(torch.equal(new[2], old[2]) for new, old in zip(found, (p, m, v), strict=True))
