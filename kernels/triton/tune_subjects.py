"""What `peftdyno tune` measures: every tuned kernel, and every operator that has several forms, on random data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.kernels import glu as gated
from peftdyno.kernels import glu_linear, linear, low_rank_input, nf4, rms_norm, tuning
from peftdyno.kernels.adapted_linear import LinearEdits, LowRank, TokenRuns, adapted_linear
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton import (
    attention,
    attention_backward,
    glu_lora,
    lora_gemm,
    lora_linear,
    nf4_gemm,
    output_gradient,
    skinny,
)
from peftdyno.kernels.triton import glu as glu_kernels
from peftdyno.kernels.triton import low_rank_input as low_rank_kernels
from peftdyno.kernels.triton.attention_library import runnable
from peftdyno.kernels.triton.low_rank import modules_of

FEW = (1, 16)
"""Tokens that are computed together while decoding: one sequence, and a small batch."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A frozen product of a model: its input's width and the rows of each of its modules."""

    columns: int
    outs: tuple[int, ...]

    @property
    def out(self) -> int:
        """Rows of the weight."""
        return sum(self.outs)


@dataclass(frozen=True, kw_only=True)
class TuneSizes:
    """Tokens, products, ranks and heads to tune for; the defaults are those of an 8B model, LoRA on every module."""

    tokens: int = 8192
    products: tuple[Product, ...] = (
        Product(columns=4096, outs=(4096, 1024, 1024)),
        Product(columns=4096, outs=(4096,)),
        Product(columns=4096, outs=(14336, 14336)),
        Product(columns=14336, outs=(4096,)),
    )
    rank: int = 16
    runs: int = 1
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True)
class Subject:
    """A tuned kernel at one shape: its entry of `tuning.SHIPPED`, and a call that must not depend on the tile."""

    kernel: str
    shape: tuple[int, ...]
    call: Callable[[], Any]

    @property
    def name(self) -> str:
        """Its entry of the cache."""
        return tuning.shape_class(self.kernel, self.shape)


@dataclass(frozen=True)
class FormSubject:
    """An operator at one shape: those of its forms that the operands allow, and a call that takes the one in force."""

    operator: str
    shape: tuple[int, ...]
    forms: tuple[str, ...]
    call: Callable[[], Any]

    @property
    def name(self) -> str:
        """Its entry of the cache."""
        return tuning.shape_class(self.operator, self.shape)


@dataclass(frozen=True)
class Draw:
    """Random tensors in the dtype that the device is tuned for."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """bf16, but for the interpreter, which multiplies it wrongly."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16

    def rows(self, n: int, columns: int, spare: int = 0) -> Tensor:
        """[n, columns] of variance 1 / columns, so that sums stay within fp16."""
        out = with_spare(n, columns, spare, torch.empty(0, dtype=self.dtype, device=self.device))
        return out.copy_(self.factors(1, n, columns)[0])

    def factors(self, runs: int, rows: int, columns: int) -> Tensor:
        """fp32 [runs, rows, columns]."""
        values: Tensor = torch.randn(runs, rows, columns, device=self.device) * columns**-0.5
        return values


def subjects(sizes: TuneSizes, device: torch.device) -> Iterator[Subject]:
    """Every tuned kernel at each shape class that the model's products and heads have; a class may come again."""
    draw = Draw(device)
    for product in sizes.products:
        yield from _skinny(product, sizes, draw)
        yield from _fused(product, sizes, draw)
        yield from _norm_and_glu(product, sizes, draw)
        if calls := _glu_lora(product, sizes, draw):
            yield Subject(
                "glu_lora_backward", (sizes.tokens, product.columns, low_rank_kernels.padded(sizes.rank)), calls[0]
            )
        if product.columns % nf4.BLOCK == 0:
            yield from _nf4(product, sizes, draw)
    yield from _attention(sizes, draw)


def _skinny(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[Subject]:
    """Low-rank factors of one module: over the product's input with dropout, and over its output's gradient."""
    n, rank, runs = sizes.tokens, sizes.rank, (0, sizes.tokens)
    streams = torch.arange(n, device=draw.device)
    keys = torch.zeros(1, 1, dtype=torch.int64, device=draw.device)
    dropout = skinny.Dropout(0.05, streams, keys)
    modules = modules_of([draw.factors(1, rank, product.columns)], (0, product.out), (1.0,))
    x, dy, u = draw.rows(n, product.columns), draw.rows(n, product.out), draw.rows(n, rank)
    down, up = draw.rows(rank, product.columns), draw.rows(product.out, rank)
    ranks = modules.rank
    forward = lambda: skinny.project(x, down, modules, runs, None, of_b=False, dropout=dropout)  # noqa: E731
    yield Subject("lora_project", (n, product.columns, ranks), forward)
    backward = lambda: skinny.project(dy, up, modules, runs, None, of_b=True)  # noqa: E731
    yield Subject("lora_project", (n, product.out, ranks), backward)
    da = lambda: skinny.outer(u, x, modules, runs, of_b=False, dropout=dropout)[0]  # noqa: E731
    yield Subject("lora_outer", (n, product.columns, ranks), da)
    yield Subject("lora_outer", (n, product.out, ranks), lambda: skinny.outer(u, dy, modules, runs, of_b=True)[0])

    def both() -> Tensor:
        du, db = output_gradient.together(dy, u, up, modules, runs, None)
        return torch.cat([du.flatten(), db[0].flatten().to(du.dtype)])

    if ranks <= output_gradient.MOST_RANKS:
        yield Subject("lora_output_gradient", (n, product.out, ranks), both)

    def add() -> Tensor:
        dx = x.clone()
        skinny.add_masked(dx, u, down, modules, runs, dropout)
        return dx

    yield Subject("lora_add", (n, product.columns, ranks), add)


def _fused(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[Subject]:
    """The product with the low-rank term of all its modules and runs in its epilogue, in both directions."""
    n, columns, out = sizes.tokens, product.columns, product.out
    spread = sizes.rank * len(product.outs) * sizes.runs
    x, dy, u, weight = draw.rows(n, columns), draw.rows(n, out), draw.rows(n, spread), draw.rows(out, columns)
    down, up = draw.rows(spread, columns), draw.rows(out, spread)
    if lora_gemm.suitable(x, dy, u, weight, down, up):
        yield Subject("lora_gemm", (n, columns, out, spread), lambda: lora_gemm.product(x, weight, u, up))
        backward = lambda: lora_gemm.product_backward(dy, weight, u, down)  # noqa: E731
        yield Subject("lora_gemm_backward", (n, out, columns, spread), backward)


def _norm_and_glu(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[Subject]:
    """What makes the product's input and x A^T of its modules."""
    if sizes.rank * len(product.outs) > low_rank_input.MOST_RANKS:
        return
    n, columns = sizes.tokens, product.columns
    spread, runs = (
        sizes.rank * len(product.outs) * sizes.runs,
        tuple(n * j // sizes.runs for j in range(sizes.runs + 1)),
    )
    a = [draw.factors(sizes.runs, sizes.rank, columns) for _ in product.outs]
    shape = n, columns, low_rank_kernels.padded(sizes.rank * len(a))
    options = a, runs, 0.0, None, None

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return low_rank_kernels.norm(x, x, weight, *options, 1e-5, 0.0, spread)[3]

    def activation(gate_up: Tensor) -> Tensor:
        return low_rank_kernels.glu(gate_up, "silu", *options, spread)[1]

    for kernel in _makers(product, sizes):
        if kernel == "rms_norm_down":
            x, weight = draw.rows(n, columns), draw.factors(1, 1, columns)[0, 0].to(draw.dtype)
            yield Subject(kernel, shape, functools.partial(norm, x, weight))
        else:
            yield Subject(kernel, shape, functools.partial(activation, draw.rows(n, 2 * columns)))


def _glu_lora(
    product: Product, sizes: TuneSizes, draw: Draw
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]] | None:
    """The gradient of gate_up before a product with a low-rank term, as one and apart; None where it is not so made."""
    if product.columns != max(p.columns for p in sizes.products) or len(product.outs) > 1:
        return None
    if sizes.rank > glu_linear.MOST_RANKS[draw.dtype.itemsize]:
        return None
    n, columns, out, runs = sizes.tokens, product.columns, product.out, sizes.runs
    offsets = [n * j // runs for j in range(runs + 1)]
    a, b = [draw.factors(runs, sizes.rank, columns)], [draw.factors(runs, out, sizes.rank)]
    streams = torch.arange(n, device=draw.device)
    keys = torch.zeros(1, runs, dtype=torch.int64, device=draw.device)
    terms = (a, b, [1.0] * runs, [0, out], offsets, 0.05, streams, keys)
    dy, u, weight = draw.rows(n, out), draw.rows(n, sizes.rank), draw.rows(out, columns)
    gate_up, inner = draw.rows(n, 2 * columns), draw.rows(n, columns)

    def joined() -> Tensor:
        return glu_lora.backward(torch.mm(dy, weight), dy, gate_up, u, *terms, "silu", 0)[0]

    def apart() -> Tensor:
        dx = lora_linear.backward(dy, inner, u, weight, *terms, 0, True)[0]
        return glu_kernels.backward(dx, gate_up, None, "silu", [], 0)[0]

    return joined, apart


def _makers(product: Product, sizes: TuneSizes) -> list[str]:
    """The operators that may make a product's input: a norm before those of the hidden width, the activation before
    that of the widest input."""
    widths = {"rms_norm_down": sizes.products[0].columns, "glu_down": max(p.columns for p in sizes.products)}
    return [operator for operator, width in widths.items() if product.columns == width]


def _nf4(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[Subject]:
    weight, out, columns = _random_nf4(product, draw), product.out, product.columns
    for n in dict.fromkeys((*FEW, sizes.tokens)):
        x = draw.rows(n, columns)
        forward = lambda x=x: nf4_gemm.forward(x, weight.codes, weight.scales(), out, None, 0)  # noqa: E731
        yield Subject("nf4_linear", (n, columns, out), forward)
    dy = draw.rows(sizes.tokens, out)
    backward = lambda: nf4_gemm.backward(dy, weight.codes, weight.scales(), columns)  # noqa: E731
    yield Subject("nf4_linear_backward", (sizes.tokens, columns, out), backward)


def _attention(sizes: TuneSizes, draw: Draw) -> Iterator[Subject]:
    n, heads, kv, d = sizes.tokens, sizes.heads, sizes.key_heads, sizes.head_dim
    qkv = draw.rows(n, (heads + 2 * kv) * d).unflatten(1, (heads + 2 * kv, d))
    q, k, v = qkv.split([heads, kv, kv], dim=1)
    half = n // 2
    segments = torch.tensor([[0, half, 0, 1], [half, n - half, 1, 2]], dtype=torch.int32)
    chain = torch.tensor([[0, half, 0], [half, n - half, 0]], dtype=torch.int32)
    options = (None, None, segments, chain, d**-0.5, 0, 0.0, 0)
    kind, shape = attention.width_class(d), attention.tile_shape(q, kv)
    yield Subject(f"attention/{kind}", shape, lambda: attention.forward(q, k, v, *options)[0])
    yield from _decoding(q, k, v, sizes)
    out, lse = attention.forward(q, k, v, *options)
    dout = draw.rows(n, heads * d)
    backward = lambda: attention_backward.backward(dout, q, k, v, None, None, out, lse, *options[2:])[0]  # noqa: E731
    yield Subject(f"attention_dq/{kind}", shape, backward)
    yield Subject(f"attention_dk/{kind}", shape, backward)


def _decoding(q: Tensor, k: Tensor, v: Tensor, sizes: TuneSizes) -> Iterator[Subject]:
    """One query each of sequences that share the keys among them, where a group's heads fit the rows of its tile."""
    if sizes.heads // sizes.key_heads > attention.DECODE_ROWS:
        return
    for count in FEW:
        length = sizes.tokens // count
        segments = torch.tensor([[i, 1, i, i + 1] for i in range(count)], dtype=torch.int32)
        chain = torch.tensor([[i * length, length, 0] for i in range(count)], dtype=torch.int32)
        queries, options = q[:count], (None, None, segments, chain, sizes.head_dim**-0.5, 0, 0.0, 0)
        call = lambda queries=queries, options=options: attention.forward(queries, k, v, *options)[0]  # noqa: E731
        yield Subject(attention.tile_name(sizes.head_dim, 1), attention.tile_shape(queries, sizes.key_heads), call)


def form_subjects(sizes: TuneSizes, device: torch.device) -> Iterator[FormSubject]:
    """Every operator that has several forms, at each product of the model."""
    yield from _attention_forms(sizes, Draw(device))
    for product in sizes.products:
        yield from _lora(product, sizes, Draw(device))
        yield from _inputs(product, sizes, Draw(device))
        yield from _activation(product, sizes, Draw(device))
        if product.columns % nf4.BLOCK == 0:
            yield from _four_bits(product, sizes, Draw(device))


def _inputs(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[FormSubject]:
    """The product with low-rank terms after the norm, or after the activation, that makes its input."""
    n, spread = sizes.tokens, sizes.rank * len(product.outs) * sizes.runs
    if sizes.rank * len(product.outs) > low_rank_input.MOST_RANKS or spread % 8:
        return
    edits, weight = _edits(product, sizes, draw), draw.rows(product.out + spread, product.columns, spread)
    weight, norm_weight = weight[: product.out], draw.factors(1, 1, product.columns)[0, 0].to(draw.dtype)
    runs = TokenRuns(offsets=tuple(n * j // sizes.runs for j in range(sizes.runs + 1)))
    rows, gate_up = draw.rows(n, product.columns), draw.rows(n, 2 * product.columns)

    def call(operator: str) -> Tensor:
        down, u = low_rank_input.down_of(operator, rows, product.columns, spread, lambda: edits, runs), None
        if operator == "glu_down":
            if down is None:
                y = gated.glu(gate_up, "silu", spare=spread)
            else:
                y, u = low_rank_input.glu_down(gate_up, "silu", down, spare=spread)
        elif down is None:
            y, _ = rms_norm.rms_norm(rows, norm_weight, eps=1e-5, spare=spread)
        else:
            y, _, u = low_rank_input.rms_norm_down(
                rows, norm_weight, down, eps=1e-5, offset=0.0, residual=None, spare=spread
            )
        return adapted_linear(y, weight, None, edits, runs, x_spare=spread, border=spread, u=u)

    for operator in _makers(product, sizes):
        shape = (n, product.columns, spread)
        yield FormSubject(operator, shape, tuning.FORMS[operator], functools.partial(call, operator))


def _activation(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[FormSubject]:
    """The backward passes of the activation and of the product that reads it."""
    calls, shape = _glu_lora(product, sizes, draw), (sizes.tokens, product.columns, sizes.rank)
    if calls is None:
        return
    joined, apart = calls

    def call() -> Tensor:
        return joined() if tuning.form("glu_lora_backward", shape, draw.device) == "together" else apart()

    yield FormSubject("glu_lora_backward", shape, tuning.FORMS["glu_lora_backward"], call)


def _edits(product: Product, sizes: TuneSizes, draw: Draw) -> LinearEdits:
    """Low-rank terms on every module of a product, without dropout."""
    ends = [sum(product.outs[: m + 1]) for m in range(len(product.outs))]
    terms = [
        LowRank(
            start=end - out,
            stop=end,
            a=draw.factors(sizes.runs, sizes.rank, product.columns),
            b=draw.factors(sizes.runs, out, sizes.rank),
            scaling=(1.0,) * sizes.runs,
        )
        for out, end in zip(product.outs, ends, strict=True)
    ]
    return LinearEdits(low_rank=tuple(terms))


def _attention_forms(sizes: TuneSizes, draw: Draw) -> Iterator[FormSubject]:
    """Attention over one sequence and over eight, in both directions, by our kernels and by each library there is."""
    n, heads, kv, d = sizes.tokens, sizes.heads, sizes.key_heads, sizes.head_dim
    q, k, v = draw.rows(n, (heads + 2 * kv) * d).unflatten(1, (heads + 2 * kv, d)).split([heads, kv, kv], dim=1)
    dout = draw.rows(n, heads * d)
    for count in (1, 8):
        cuts = [n * i // count for i in range(count + 1)]
        spans = list(itertools.pairwise(cuts))
        segments = torch.tensor([[a, b - a, i, i + 1] for i, (a, b) in enumerate(spans)], dtype=torch.int32)
        chain = torch.tensor([[a, b - a, 0] for a, b in spans], dtype=torch.int32)
        options = (None, None, segments, chain, d**-0.5, 0, 0.0, 0)
        longest = 1 << (max(b - a for a, b in spans) - 1).bit_length()
        shape = (n, heads, kv, d, longest, 0)
        out, lse = attention.forward(q, k, v, *options)
        forward = lambda options=options: attention.forward(q, k, v, *options)[0]  # noqa: E731
        yield FormSubject("attention", shape, runnable("attention", draw.device), forward)
        saved = (out, lse, *options[2:])
        backward = lambda saved=saved: attention_backward.backward(dout, q, k, v, None, None, *saved)[0]  # noqa: E731
        yield FormSubject("attention_backward", shape, runnable("attention_backward", draw.device), backward)


def _random_nf4(product: Product, draw: Draw) -> nf4.Nf4Weight:
    """Random codes and scales."""
    elements = product.out * product.columns
    codes = torch.randint(256, (elements // 2,), dtype=torch.uint8, device=draw.device)
    absmax = torch.rand(elements // nf4.BLOCK, device=draw.device)
    return nf4.Nf4Weight(codes=codes, absmax=absmax, shape=(product.out, product.columns), dtype=draw.dtype)


def _four_bits(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[FormSubject]:
    """The product with a weight in 4 bits, for a token, for as many as decode together, and for a pack."""
    weight = _random_nf4(product, draw)
    for n in dict.fromkeys((*FEW, sizes.tokens)):
        x, dy, shape = draw.rows(n, product.columns), draw.rows(n, product.out), (n, product.columns, product.out)
        forward = lambda x=x: linear.product(x, weight, None, 0)  # noqa: E731
        yield FormSubject("nf4_linear", shape, tuning.FORMS["nf4_linear"], forward)
        backward = lambda dy=dy: linear.product_backward(dy, weight)  # noqa: E731
        if n == sizes.tokens:
            yield FormSubject("nf4_linear_backward", shape, tuning.FORMS["nf4_linear_backward"], backward)


def _lora(product: Product, sizes: TuneSizes, draw: Draw) -> Iterator[FormSubject]:
    """The product with low-rank terms on all its modules, in memory that allows every form."""
    n, ranks = sizes.tokens, sizes.rank
    spread = ranks * len(product.outs) * sizes.runs
    shape = (n, product.columns, product.out, spread)
    weight = draw.rows(product.out + spread, product.columns, spread)[: product.out]
    a = [draw.factors(sizes.runs, ranks, product.columns) for _ in product.outs]
    b = [draw.factors(sizes.runs, out, ranks) for out in product.outs]
    ends = [sum(product.outs[: m + 1]) for m in range(len(product.outs))]
    rows = [i for out, end in zip(product.outs, ends, strict=True) for i in (end - out, end)]
    offsets = [n * j // sizes.runs for j in range(sizes.runs + 1)]
    factors = (a, b, [1.0] * (len(a) * sizes.runs), rows, offsets, 0.0, None, None)
    x, dy = draw.rows(n, product.columns, spread), draw.rows(n, product.out, spread)
    u = draw.rows(n, ranks * len(product.outs))
    aligned = lora_gemm.suitable(x, dy, weight, torch.empty(1, spread, dtype=draw.dtype, device=draw.device))
    forms = tuning.FORMS["lora_linear"] if aligned else ("bordered", "plain")
    forward = lambda: lora_linear.forward(x, weight, None, *factors, spread, spread, 0)[0]  # noqa: E731
    yield FormSubject("lora_linear", shape, forms, forward)
    backward = lambda: lora_linear.backward(dy, x, u, weight, *factors, spread, True)[0]  # noqa: E731
    yield FormSubject("lora_linear_backward", shape, forms, backward)
    modules, up = modules_of(a, rows, factors[2]), draw.rows(product.out, spread)
    if modules.rank <= output_gradient.MOST_RANKS:
        gradient = lambda: output_gradient.du_and_db(dy, u, up, modules, offsets, None)[0]  # noqa: E731
        part = (n, product.out, modules.rank)
        yield FormSubject("lora_output_gradient", part, tuning.FORMS["lora_output_gradient"], gradient)
