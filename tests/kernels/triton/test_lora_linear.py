"""Products with low-rank terms: every form against the reference, dropout's bits, and nothing written elsewhere."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import lora_linear, tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.random import keep_mask, stream_key
from peftdyno.kernels.triton import load, lora_gemm, output_gradient
from peftdyno.kernels.tuning import Tile


@dataclass(frozen=True)
class Case:
    """Offsets of the runs, input width, output width, (rank, first row, last row) of the modules."""

    runs: tuple[int, ...]
    columns: int
    out: int
    modules: tuple[tuple[int, int, int], ...]

    @property
    def spread(self) -> int:
        return (len(self.runs) - 1) * sum(rank for rank, _, _ in self.modules)


CASES = [
    Case((0, 1), 3, 1, ((1, 0, 1),)),
    Case((0, 63), 200, 127, ((8, 0, 127),)),
    Case((0, 33, 33, 127), 63, 150, ((4, 0, 63), (17, 70, 150))),
    Case((0, 16, 48), 128, 64, ((16, 0, 32), (16, 32, 64))),
    Case((0, 3, 20), 40, 24, ((130, 0, 8), (300, 9, 24))),
]
"""The last one's ranks are multiplied in pieces, its factors packed in blocks, and neither divides them."""


def stacked(num_runs: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """A factor [R, rows, columns] as it lies in a bank: each run's among those of other modules."""
    flat = torch.randn(num_runs, rows * columns + 7, device=device)
    return flat[:, 3 : rows * columns + 3].view(num_runs, rows, columns)


def arguments(case: Case, dropout: float, dtype: torch.dtype, device: torch.device, border: int) -> list[Any]:
    n, num_runs = case.runs[-1], len(case.runs) - 1
    storage = torch.full((case.out + border, case.columns + border), float("nan"), dtype=dtype, device=device)
    weight = storage[: case.out, : case.columns]
    weight.copy_(torch.randn(case.out, case.columns) / case.columns**0.5)
    x = with_spare(n, case.columns, border, weight)
    x.copy_(torch.randn(n, case.columns))
    a = [stacked(num_runs, rank, case.columns, device) for rank, _, _ in case.modules]
    b = [stacked(num_runs, stop - start, rank, device) for rank, start, stop in case.modules]
    keys = [[stream_key(7, f"m{m}", j) for j in range(num_runs)] for m in range(len(a))]
    rows = [i for _, start, stop in case.modules for i in (start, stop)]
    scaling = [0.1 + 0.2 * i for i in range(num_runs * len(a))]
    streams = torch.randint(2**45, (n,), device=device) if dropout else None
    return [x, weight, a, b, scaling, rows, list(case.runs), dropout, streams, torch.tensor(keys) if dropout else None]


@pytest.mark.parametrize(
    ("case", "dropout", "bordered", "dtype"),
    [
        (CASES[0], 0.3, False, torch.float32),
        (CASES[0], 0.0, True, torch.float32),
        (CASES[1], 0.0, False, torch.float16),
        (CASES[1], 0.3, True, torch.float32),
        (CASES[2], 0.0, True, torch.float16),
        (CASES[2], 0.3, False, torch.float32),
        (CASES[3], 0.3, True, torch.float16),
        (CASES[3], 0.0, False, torch.float32),
        (CASES[4], 0.3, False, torch.float32),
        (CASES[4], 0.0, True, torch.float16),
    ],
)
def test_lora_linear(case: Case, dropout: float, bordered: bool, dtype: torch.dtype, device: Any) -> None:
    border = case.spread + 3 if bordered else 0
    x, weight, *rest = arguments(case, dropout, dtype, device, border)
    bias = torch.randn(case.out, device=device).to(dtype)
    forward = (x, weight, bias, *rest, border, border, 5)
    y, u = load("lora_linear")(*forward)
    plain = lora_linear.reference_forward(*forward)
    truth = in_float64(lora_linear.reference_forward, forward)
    assert y.stride(0) == case.out + 5
    assert not excess("lora_linear", (y, u), plain, truth)

    dy = with_spare(x.shape[0], case.out, border, x)
    dy.copy_(torch.randn(x.shape[0], case.out))
    for need_x in (True, False) if case is CASES[2] else (True,):
        backward = (dy, x, u, weight, *rest, border, need_x)
        found = load("lora_linear_backward")(*backward)
        truth = in_float64(lora_linear.reference_backward, backward)
        assert not excess("lora_linear_backward", found, lora_linear.reference_backward(*backward), truth)


ALIGNED = Case((0, 16, 48), 128, 64, ((8, 0, 32), (8, 32, 64)))
"""Every operand's rows start at multiples of 16 bytes, as the fused form wants them."""


@pytest.mark.parametrize("form", tuning.FORMS["lora_linear"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(ALIGNED, torch.float16), (ALIGNED, torch.float32), (CASES[2], torch.float16)],
    ids=["aligned", "fp32", "odd"],
)
def test_a_chosen_form_runs_where_the_operands_allow_it(
    case: Case, dtype: torch.dtype, form: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both directions in each form, against the reference; odd shapes and fp32 go to the next form that takes them."""
    launches: list[str] = []
    for name in ("product", "product_backward"):
        plain = getattr(lora_gemm, name)
        monkeypatch.setattr(lora_gemm, name, lambda *a, n=name, f=plain: (launches.append(n), f(*a))[1])
    x, weight, *rest = arguments(case, 0.0, dtype, device, case.spread)
    bias = torch.randn(case.out, device=device).to(dtype)
    dy = with_spare(x.shape[0], case.out, case.spread, x)
    dy.copy_(torch.randn(x.shape[0], case.out))
    forward = (x, weight, bias, *rest, case.spread, case.spread, 0)
    with tuning.trial_form("lora_linear", form), tuning.trial_form("lora_linear_backward", form):
        found = load("lora_linear")(*forward)
        backward = (dy, x, found[1], weight, *rest, case.spread, True)
        gradients = load("lora_linear_backward")(*backward)
    truth = in_float64(lora_linear.reference_forward, forward)
    assert not excess("forward", found, lora_linear.reference_forward(*forward), truth)
    truth = in_float64(lora_linear.reference_backward, backward)
    assert not excess("backward", gradients, lora_linear.reference_backward(*backward), truth)
    fused = form == "fused" and case is ALIGNED and dtype == torch.float16
    assert launches == (["product", "product_backward"] if fused else [])


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]], ids=["odd", "empty run", "even"])
@pytest.mark.parametrize(("dropout", "bordered"), [(0.0, True), (0.0, False), (0.3, False)])
@pytest.mark.parametrize("tile", [None, Tile(16, 16, 4, 1), Tile(32, 64, 4, 1)], ids=["shipped", "small", "wide"])
def test_one_read_of_dy_gives_du_and_db(
    case: Case, dropout: float, bordered: bool, tile: Tile | None, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many blocks of columns and chunks of tokens, and with one; du is seen in dA and dx."""
    if tile is not None:
        monkeypatch.setitem(tuning.SHIPPED, "lora_output_gradient", dict.fromkeys((80, 90, 100), tile))
        monkeypatch.setattr(output_gradient, "CHUNK", 32)
    calls: list[int] = []
    together = output_gradient.together
    monkeypatch.setattr(output_gradient, "together", lambda *a: (calls.append(1), together(*a))[1])
    border = case.spread if bordered else 0
    x, weight, *rest = arguments(case, dropout, torch.float16, device, border)
    dy = with_spare(x.shape[0], case.out, border, x)
    dy.copy_(torch.randn(x.shape[0], case.out))
    _, u = load("lora_linear")(x, weight, None, *rest, border, border, 0)
    backward = (dy, x, u, weight, *rest, border, True)
    with tuning.trial_form("lora_output_gradient", "together"):
        found, again = (load("lora_linear_backward")(*backward) for _ in range(2))
    truth = in_float64(lora_linear.reference_backward, backward)
    assert not excess("lora_linear_backward", found, lora_linear.reference_backward(*backward), truth)
    pairs = zip([*found[1], *found[2]], [*again[1], *again[2]], strict=True)
    assert len(calls) == 2 and all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    ("case", "dtype"), [(CASES[2], torch.float32), (CASES[4], torch.float16)], ids=["fp32", "ranks"]
)
def test_high_ranks_and_wide_elements_read_dy_twice(
    case: Case, dtype: torch.dtype, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_gradient, "together", None)
    x, weight, *rest = arguments(case, 0.0, dtype, device, 0)
    dy, (_, u) = torch.randn(x.shape[0], case.out).to(x), load("lora_linear")(x, weight, None, *rest, 0, 0, 0)
    backward = (dy, x, u, weight, *rest, 0, True)
    with tuning.trial_form("lora_output_gradient", "together"):
        found = load("lora_linear_backward")(*backward)
    truth = in_float64(lora_linear.reference_backward, backward)
    assert not excess("lora_linear_backward", found, lora_linear.reference_backward(*backward), truth)


def test_gradient_inside_another_tensor_is_not_widened(device: Any) -> None:
    """A slice's right-hand neighbours are someone else's: they are neither read nor written."""
    case = CASES[1]
    x, weight, *rest = arguments(case, 0.0, torch.float32, device, case.spread)
    _, u = load("lora_linear")(x, weight, None, *rest, case.spread, case.spread, 0)
    whole = torch.randn(x.shape[0], case.out + case.spread + 1, device=device)
    before = whole.clone()
    dy = whole[:, : case.out]
    found = load("lora_linear_backward")(dy, x, u, weight, *rest, case.spread, True)
    assert torch.equal(whole, before)
    backward = (dy, x, u, weight, *rest, case.spread, True)
    truth = in_float64(lora_linear.reference_backward, backward)
    assert not excess("lora_linear_backward", found, lora_linear.reference_backward(*backward), truth)


def test_gradients_have_the_same_bits_twice(device: Any) -> None:
    case = CASES[2]
    x, weight, *rest = arguments(case, 0.3, torch.float32, device, 0)
    dy = torch.randn(x.shape[0], case.out, device=device)
    _, u = load("lora_linear")(x, weight, None, *rest, 0, 0, 0)
    first, second = (load("lora_linear_backward")(dy, x, u, weight, *rest, 0, True) for _ in range(2))
    assert all(
        torch.equal(p, q)
        for one, other in zip(first[1:], second[1:], strict=True)
        for p, q in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (63, 127), (40, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dropout_draws_the_same_bits(tokens: int, columns: int, dtype: torch.dtype, device: Any) -> None:
    """Values of 16 bits are masked in pairs, with a comparison that differs below and above a half."""
    from peftdyno.kernels.triton import dropout

    streams = torch.randint(2**62, (tokens,), device=device)
    x = torch.full((tokens, columns), float("inf"), dtype=dtype, device=device)
    for seed, dropped in enumerate((1, 24248, 32767, 32768, 32769, 65535)):
        key = stream_key(seed, "dropout")
        found: Tensor = dropout.drop(x, streams, key, dropped / 65536)
        kept = keep_mask(streams, columns, key, dropped / 65536)
        assert torch.equal(found, torch.where(kept, x, 0.0))
