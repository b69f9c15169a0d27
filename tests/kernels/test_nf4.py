"""Four-bit weights: the nearest code of each element, the same values by every form, and bitsandbytes' own bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from peftdyno.kernels import cpu, memory, nf4
from peftdyno.kernels.adapted_linear import Columns, LinearEdits, LowRank, TokenRuns, adapted_linear
from peftdyno.kernels.library import COSTS, PRIMITIVES
from peftdyno.kernels.linear import linear
from peftdyno.kernels.nf4 import (
    BLOCK,
    CHUNK,
    CODEBOOK,
    NESTED_BLOCK,
    QUANTISED,
    NestedAbsmax,
    Nf4Weight,
    quantise,
    stacked,
)
from peftdyno.kernels.oracle import excess, in_float64
from peftdyno.kernels.workspace import Workspace, cpu_workspace

SHAPES = [(1, 64), (63, 64), (127, 192), (2 * CHUNK // 64 + 3, 64), (QUANTISED // 64 + 1, 64), (64, 1), (3, 320)]
"""One block, odd numbers of them, more than are looked up and quantised at a time, and blocks across rows."""
COMPILED = pytest.mark.skipif(not cpu.implementations("nf4_dequantise"), reason="the C++ kernels are not built")
KINDS = pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nf4-double"])


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, so that each block has its own scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-4, 1, rows)[:, None]
    return (scale * torch.randn(rows, columns, generator=generator)).to(dtype)


def nibbles(weight: Nf4Weight) -> torch.Tensor:
    """The code of every element in row order."""
    return torch.stack([weight.codes >> 4, weight.codes & 15], dim=1).flatten()


def arguments(weight: Nf4Weight, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of the dequantising operator."""
    return weight.codes, weight.absmax, *weight.shape, dtype


def test_codebook_holds_normal_quantiles() -> None:
    offset = 0.5 * (31 / 32 + 29 / 30)  # the middle of the two tails that 16 and 15 equal bins leave (appendix E)
    below = torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    quantiles = torch.cat([-below, torch.zeros(1), above.flip(0)]).double()
    assert torch.allclose(quantiles / quantiles.max(), torch.tensor(CODEBOOK, dtype=torch.float64), atol=1e-5, rtol=0)


def test_dynamic_codes_are_a_dozen_octaves_around_zero() -> None:
    codes = nf4.dynamic_codes(torch.device("cpu")).double()
    assert codes.unique().numel() == 256 and bool((codes.diff() > 0).all())
    positive = codes[codes > 0]
    assert torch.equal(codes[codes < 0].flip(0), -positive[:-1]) and positive[-1] == 1
    decades = [int(((positive > 10.0 ** (e - 1)) & (positive < 10.0**e)).sum()) for e in range(-6, 1)]
    assert decades == [2**bits for bits in range(7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_the_nearest(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    quantised = quantise(weight)
    blocks = weight.double().view(-1, BLOCK)
    distance = ((blocks / blocks.abs().amax(1, keepdim=True)).flatten()[:, None] - torch.tensor(CODEBOOK)).abs()
    taken = distance.gather(1, nibbles(quantised).long()[:, None])[:, 0]
    assert bool((taken <= distance.amin(1) + 1e-6).all())
    assert torch.equal(quantised.absmax, weight.view(-1, BLOCK).abs().amax(1))


def test_a_block_of_zeros_and_a_block_with_a_nan() -> None:
    weight = torch.randn(3, 64)
    weight[0], weight[2, 5] = 0.0, float("nan")
    found = quantise(weight).dense()
    assert torch.equal(found[0], weight[0]) and bool(found[1].isfinite().all()) and bool(found[2].isnan().all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pairs_equal_the_reference(poison: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    values = arguments(quantise(random_weight(*shape)), dtype)
    reference = PRIMITIVES["nf4_dequantise"].implementations["reference"]
    found = nf4.dequantise_by_pairs(*values)
    assert torch.equal(found, reference(*values)) and found.dtype == dtype and found.shape == shape


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit, the sign of zero included; any NaN equals any other."""
    whole = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    differ = (found.view(whole) != expected.view(whole)) & ~(found.isnan() & expected.isnan())
    return found.dtype == expected.dtype and found.shape == expected.shape and not bool(differ.any())


@COMPILED
@KINDS
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_equals_the_reference(
    isa: str, poison: None, shape: tuple[int, int], nested: bool, dtype: torch.dtype
) -> None:
    weight = quantise(random_weight(*shape), nested=nested)
    values = weight.codes, weight.scales(), *shape, dtype
    forms = PRIMITIVES["nf4_dequantise"].implementations
    assert forms["cpu"] is nf4.dequantise_compiled
    assert same_bits(forms["cpu"](*values), forms["reference"](*values))


@COMPILED
@pytest.mark.parametrize("threads_used", [1, 2])
def test_compiled_equals_the_reference_at_extremes(
    isa: str, threads: Any, threads_used: int, dtype: torch.dtype
) -> None:
    """Every pair of codes with maxima that are zero, not normal, rounded up to infinity, infinite, negative, or NaN."""
    threads(threads_used)
    codes = torch.arange(256).to(torch.uint8).repeat(100)
    extremes = torch.tensor([0.0, 1e-45, 1e-40, 1.2e-38, 3.4e38, math.inf, -math.inf, math.nan, -1.0, -0.0])
    absmax = extremes.repeat_interleave(codes.numel() // 32 // len(extremes))
    values = codes, absmax, absmax.numel(), BLOCK, dtype
    assert same_bits(nf4.dequantise_compiled(*values), nf4.reference_dequantise(*values))


@COMPILED
@pytest.mark.parametrize("sizes", [[1], [256], [300, 1, 63], [255, 0, 257, 512]], ids=str)
def test_compiled_absmax_equals_the_reference(poison: None, sizes: list[int]) -> None:
    codes = torch.randint(256, (sum(sizes),), dtype=torch.uint8)
    factors = torch.logspace(-40, 30, sum(-(-size // NESTED_BLOCK) for size in sizes))
    values = codes, factors, torch.randn(len(sizes)), sizes
    assert same_bits(nf4.absmax_compiled(*values), nf4.reference_absmax(*values))


@COMPILED
def test_compiled_holds_nothing_beside_its_result() -> None:
    values = arguments(quantise(random_weight(512, 96)), torch.bfloat16)
    nf4.dequantise_compiled(*values)
    with memory.AllocatorPeak() as allocator:
        out = nf4.dequantise_compiled(*values)
    assert allocator.peak_bytes == out.nbytes and cpu_workspace("nf4_dequantise", values) == Workspace()


@COMPILED
def test_compiled_refuses_what_does_not_fit() -> None:
    codes, absmax, rows, columns, dtype = arguments(quantise(random_weight(4, 64)), torch.float32)
    for wrong in [(codes[1:], absmax), (codes, absmax[1:]), (codes[::2], absmax), (codes, absmax.double())]:
        with pytest.raises(RuntimeError, match=r"4-bit weight|do not fit a weight of 4 x 64"):
            nf4.dequantise_compiled(*wrong, rows, columns, dtype)
    with pytest.raises(RuntimeError, match="does not fit its modules"):
        nf4.absmax_compiled(torch.zeros(257, dtype=torch.uint8), torch.ones(1), torch.zeros(1), [257])


def test_implementations_stay_within_the_budget(poison: None) -> None:
    for name, values in {
        "nf4_dequantise": arguments(quantise(random_weight(127, 64)), torch.bfloat16),
        "nf4_absmax": _nested_arguments(stacked([quantise(random_weight(n, 64), nested=True) for n in (300, 1, 63)])),
    }.items():
        forms = PRIMITIVES[name].implementations
        reference = forms["reference"]
        truth = in_float64(reference, values)
        for form, function in forms.items():
            assert not (lines := excess(f"{name} {form}", function(*values), reference(*values), truth)), lines


def _nested_arguments(weight: Nf4Weight) -> tuple[Any, ...]:
    scales = weight.absmax
    assert isinstance(scales, NestedAbsmax)
    return scales.codes, scales.absmax, scales.offsets, scales.sizes


@KINDS
def test_error_is_at_most_half_the_widest_gap(nested: bool) -> None:
    weight = random_weight(512, 128) if not nested else torch.randn(512, 128)
    quantised = quantise(weight, nested=nested)
    scales = quantised.absmax.dense() if isinstance(quantised.absmax, NestedAbsmax) else quantised.absmax
    exact = weight.view(-1, BLOCK).abs().amax(1)
    gap = max(b - a for a, b in pairwise(CODEBOOK)) / 2
    error = (quantised.dense() - weight).view(-1, BLOCK).abs().amax(1)
    assert bool((error <= gap * exact + (scales - exact).abs() + 1e-6 * exact).all())
    if nested:
        spread = (exact - exact.mean()).abs().max()
        widest = float(nf4.dynamic_codes(torch.device("cpu")).diff().max()) / 2
        assert float((scales - exact).abs().max()) <= spread * widest + 1e-6


@KINDS
def test_modules_stacked_equal_modules_apart(nested: bool) -> None:
    modules = [random_weight(n, 96, seed=n) for n in (400, 2, 64)]  # 600, 3 and 96 blocks: none fills its last 256
    apart = [quantise(module, nested=nested) for module in modules]
    whole = stacked(apart)
    assert torch.equal(whole.dense(), torch.cat([m.dense() for m in apart]))
    assert torch.equal(whole.rows(400, 402), apart[1].dense())
    assert whole.shape == (466, 96) and whole.dtype == torch.float32 and whole.device == modules[0].device


@KINDS
def test_bytes_stored(nested: bool) -> None:
    weight = quantise(torch.randn(1024, 128), nested=nested)
    n, blocks = 1024 * 128, 1024 * 128 // BLOCK
    scales = blocks + 4 * (blocks // NESTED_BLOCK) + 4 if nested else 4 * blocks
    assert sum(t.numel() * t.element_size() for t in weight.tensors()) == n // 2 + scales
    meta = quantise(torch.randn(1024, 128, device="meta"), nested=nested)
    assert [(t.shape, t.dtype) for t in meta.tensors()] == [(t.shape, t.dtype) for t in weight.tensors()]
    assert meta.dense().is_meta and meta.dense().shape == weight.shape


def test_cost_of_dequantising() -> None:
    values = arguments(quantise(torch.randn(6, 64)), torch.bfloat16)
    cost = COSTS["nf4_dequantise"](*values)
    assert (cost.base.pointwise, cost.base.bytes) == (384, 192 + 4 * 6 + 2 * 384)
    assert cost.adapter.pointwise == 0


def test_a_part_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="3 x 32 elements cannot be divided into blocks of 64"):
        quantise(torch.randn(3, 32))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_equal_those_of_the_dense_weight(nested: bool, dtype: torch.dtype) -> None:
    weight = quantise(torch.randn(96, 64).to(dtype), nested=nested)
    inputs, runs = torch.randn(9, 64).to(dtype), TokenRuns(offsets=(0, 4, 9))
    bias, seed = torch.randn(96).to(dtype), torch.randn(9, 96).to(dtype)
    factors = [torch.randn(2, 3, 64), torch.randn(2, 32, 3), torch.randn(2, 16), torch.randn(2, 96)]

    def results(base: nf4.Weight, edited: bool) -> list[torch.Tensor]:
        x, a, b, scale, shift = (t.clone().requires_grad_() for t in (inputs, *factors))
        low_rank = LowRank(start=32, stop=64, a=a, b=b, scaling=(0.5, 2.0))
        scales, shifts = (Columns(start=8, values=scale),), (Columns(start=0, values=shift),)
        edits = LinearEdits(low_rank=(low_rank,), scales=scales, shifts=shifts)
        y = adapted_linear(x, base, bias, edits, runs) if edited else linear(x, base, bias)
        return [y.detach(), *torch.autograd.grad(y, [x, a, b, scale, shift] if edited else [x], seed)]

    for edited in (False, True):
        pairs = zip(results(weight, edited), results(weight.dense(), edited), strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)


class TestBitsandbytes:
    """The same bytes and values as bitsandbytes on the CPU."""

    @pytest.fixture(autouse=True)
    def functional(self) -> Any:
        self.theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

    @pytest.mark.parametrize("shape", [(1, 64), (63, 64), (127, 192), (40, 1024), (64, 96), (2, 32)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_codes_absmax_and_values(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        weight = random_weight(*shape, dtype)
        codes, state = self.theirs.quantize_4bit(weight, quant_type="nf4")
        ours = quantise(weight)
        assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.absmax, state.absmax)
        if shape[1] % BLOCK == 0:  # its CPU library is wrong where a row is no whole blocks
            assert torch.equal(ours.dense(), self.theirs.dequantize_4bit(codes, state))

    @pytest.mark.parametrize("shape", [(256, 64), (300, 192)])
    def test_double_quantisation(self, shape: tuple[int, int]) -> None:
        """Its CPU library takes the second level's codes from an approximate table: where a code differs, ours is the
        nearer one. Given the same codes the values are the same."""
        weight = torch.randn(*shape)
        codes, state = self.theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        ours = quantise(weight, nested=True).absmax
        assert torch.equal(nf4.dynamic_codes(weight.device), state.state2.code)
        assert torch.equal(ours.absmax, state.state2.absmax) and torch.equal(ours.offsets[0], state.offset)
        differ = ours.codes != state.absmax
        assert float(differ.float().mean()) < 0.01
        given = NestedAbsmax(codes=state.absmax, absmax=ours.absmax, offsets=ours.offsets, sizes=ours.sizes)
        exact = weight.view(-1, BLOCK).abs().amax(1)
        tie = 1e-6 * float((exact - exact.mean()).abs().max())
        assert bool(((ours.dense() - exact).abs() <= (given.dense() - exact).abs() + tie).all())
        same = Nf4Weight(codes=codes.flatten(), absmax=given, shape=shape, dtype=weight.dtype)
        assert torch.equal(same.dense(), self.theirs.dequantize_4bit(codes, state))

    def test_bits_an_element(self) -> None:
        weight = quantise(torch.randn(256, 64 * NESTED_BLOCK // 256), nested=True)
        bits = 8 * sum(t.numel() * t.element_size() for t in weight.tensors()) / math.prod(weight.shape)
        assert 4.12 < bits < 4.14
