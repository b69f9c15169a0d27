"""Calls of every operator as a step makes them, on fresh random data: what is checked, and then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Sequence, build_pack
from peftdyno.kernels import (  # each import registers an operator
    adamw,  # noqa: F401
    attention,
    bank_affine,  # noqa: F401
    glu,  # noqa: F401
    glu_linear,  # noqa: F401
    label_loss,  # noqa: F401
    linear,  # noqa: F401
    lora_linear,  # noqa: F401
    lora_terms,  # noqa: F401
    low_rank_input,  # noqa: F401
    picked_rows,  # noqa: F401
    rms_norm,  # noqa: F401
    rotary,
    tuning,
)
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.random import stream_key
from peftdyno.kernels.triton import load


@dataclass(frozen=True)
class Case:
    """An operator on arguments that `make(dtype, tokens)` draws; `changed` are those it writes to.

    `against` names what a user would otherwise run: a callable with the same arguments, made by `micro`. `form` is one
    of the forms that only tuning chooses, the operator's or that of the `part` of it that has forms; without it, what
    runs is what the machine's choices say. `goal`: a goal rests on its time.
    """

    operator: str
    label: str
    make: Callable[[torch.dtype, int], tuple[Any, ...]]
    changed: tuple[int, ...] = ()
    against: str = ""
    form: str = ""
    part: str = ""
    goal: bool = False

    @property
    def name(self) -> str:
        """Operator and label."""
        return f"{self.operator} {self.label}".strip()

    def call(self, *arguments: Any) -> Any:
        """The operator's Triton kernels, or its form."""
        with tuning.trial_form(self.part or self.operator, self.form) if self.form else nullcontext():
            return load(self.operator)(*arguments)


@dataclass(frozen=True)
class Draw:
    """Random tensors of the sizes of a model."""

    sizes: Sizes
    device: torch.device

    def rows(self, n: int, columns: int, dtype: torch.dtype, spare: int = 0) -> Tensor:
        """[n, columns] of variance 1."""
        like = torch.empty(0, dtype=dtype, device=self.device)
        return with_spare(n, columns, spare, like).copy_(torch.randn(n, columns, device=self.device))

    def masters(self, *shape: int) -> Tensor:
        """fp32 values of variance 1/100."""
        return 0.1 * torch.randn(*shape, device=self.device)

    def runs(self, tokens: int, count: int) -> list[int]:
        """Offsets of runs of unequal length; the second is empty where there are three or more."""
        cuts = sorted((tokens * j * (j + 1)) // (count * (count + 1)) for j in range(count + 1))
        if count > 2:
            cuts[2] = cuts[1]
        return cuts

    def layout(self, tokens: int, kind: str) -> tuple[Tensor, Tensor]:
        """Tables of a pack of `kind`: equal sequences, ragged ones, or children of a shared prefix."""
        if kind == "equal":
            lengths, shared = [tokens // self.sizes.sequences] * self.sizes.sequences, 0
        elif kind == "ragged":
            lengths, shared = _ragged(tokens), 0
        else:
            shared = max(1, tokens // 8)
            lengths = [shared + own for own in _ragged(tokens - shared)]
        sequences = [
            Sequence(tokens=(7,) * shared + (i + 8,) * (n - shared), num_prompt=1, ordinal=i)
            for i, n in enumerate(lengths)
        ]
        layout = build_pack(sequences, share_prefix=shared > 0).layout
        return layout.segments, layout.chain


def _ragged(tokens: int) -> list[int]:
    """Lengths that add up: long sequences first, then ever shorter ones."""
    lengths = []
    while tokens > 0:
        lengths.append(max(1, tokens // 3) if tokens > 8 else tokens)
        tokens -= lengths[-1]
    return lengths


def pointwise(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Norms, activations, rotary embedding, scales and shifts, AdamW."""
    config, draw = sizes.config(), Draw(sizes, device)
    d, f = config.hidden_size, config.intermediate_size
    eps, r = config.rms_norm_eps, sizes.runs
    heads, width = config.num_attention_heads + config.num_key_value_heads, config.head_dim

    def norm(t: torch.dtype, n: int) -> tuple[Any, ...]:
        return draw.rows(n, d, t, 64), draw.rows(n, d, t), draw.rows(1, d, t)[0], [], eps, 0.0, 64

    def norm_backward(t: torch.dtype, n: int, runs: int = 0) -> tuple[Any, ...]:
        weight = draw.masters(runs, d) if runs else draw.rows(1, d, t)[0]
        rstd = torch.rand(n, device=device) + 0.5
        offsets = draw.runs(n, runs) if runs else []
        return *(draw.rows(n, d, t) for _ in range(3)), weight, rstd, offsets, 0.0, runs > 0

    def activation(t: torch.dtype, n: int, runs: int = 0) -> tuple[Any, ...]:
        scale = draw.masters(runs, f) if runs else None
        return draw.rows(n, 2 * f, t), scale, "silu", draw.runs(n, max(runs, 1)), 64

    def turn(t: torch.dtype, n: int) -> tuple[Any, ...]:
        frequencies = config.rope_theta ** -(torch.arange(width // 2, device=device) / (width // 2))
        cos, sin = rotary.angles(torch.arange(n, device=device), frequencies)
        return draw.rows(n, (heads + config.num_key_value_heads) * width, t), cos, sin, heads, False

    def update(_: torch.dtype, n: int) -> tuple[Any, ...]:
        p, g, m, v = (draw.masters(r, n * 64) for _ in range(4))
        return p, g, m, v.abs_(), [1e-4] * r, [1.0] * r, [7] * r, 0.9, 0.999, 1e-8, 0.01

    yield Case("rms_norm", "+ residual", norm, against="eager compile liger", goal=True)
    yield Case("rms_norm_backward", "frozen", norm_backward, against="eager compile liger", goal=True)
    yield Case("rms_norm_backward", f"LN-tuning, {r} runs", lambda t, n: norm_backward(t, n, r))
    yield Case("glu", "silu", activation, against="eager compile liger", goal=True)
    yield Case("glu", f"silu, IA3 of {r} runs", lambda t, n: activation(t, n, r))
    back = lambda t, n: (draw.rows(n, f, t), *activation(t, n))  # noqa: E731
    yield Case("glu_backward", "silu", back, against="eager compile liger", goal=True)
    yield Case("glu_backward", "silu, IA3", lambda t, n: (draw.rows(n, f, t), *activation(t, n, r)))
    yield Case("rotary_", "", turn, changed=(0,), against="eager compile liger", goal=True)
    scaled = lambda t, n: (draw.rows(n, d, t), draw.masters(r, d), 0, draw.runs(n, r))  # noqa: E731
    yield Case("bank_scale_", f"{r} runs", scaled, changed=(0,), against="eager compile")
    yield Case("bank_shift_", f"{r} runs", scaled, changed=(0,), against="eager compile")
    sums = lambda t, n: (draw.rows(n, d, t), draw.rows(n, d, t), 0, d, draw.runs(n, r))  # noqa: E731
    yield Case("bank_column_sums", f"{r} runs", sums, against="eager compile")
    factors = lambda t, n: (draw.rows(n, d, t), torch.randn(n, device=device))  # noqa: E731
    yield Case("scale_rows", "", factors, against="eager compile")
    picks = lambda t, n: (draw.rows(n, d, t), torch.randint(n, (n,), device=device), n, False)  # noqa: E731
    yield Case("picked_rows_backward", "", picks)
    yield Case("adamw_", f"{r} runs", update, changed=(0, 2, 3), against="eager compile")


def losses(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """LM head and cross-entropy."""
    config, draw = sizes.config(), Draw(sizes, device)

    def make(t: torch.dtype, n: int) -> tuple[Any, ...]:
        head = draw.rows(config.vocab_size, config.hidden_size, t)
        targets = torch.randint(config.vocab_size, (n,), device=device)
        return draw.rows(n, config.hidden_size, t), head * config.hidden_size**-0.5, targets, 0.0, True

    yield Case("label_loss", "", make, against="eager liger")


def sites(config: DecoderConfig) -> dict[str, tuple[int, list[int]]]:
    """Of each product of a layer: its input's width, and the rows of each of its modules."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"qkv": (d, [q, kv, kv]), "o": (q, [d]), "gate_up": (d, [f, f]), "down": (f, [d])}


def products(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The four products of a layer, frozen and with low-rank terms, forward and backward."""
    draw = Draw(sizes, device)
    for site, (columns, outs) in sites(sizes.config()).items():
        out = sum(outs)
        dense = lambda t, n, c=columns, o=out: (draw.rows(n, c, t), draw.rows(o, c, t) * c**-0.5, None, 0)  # noqa: E731
        yield Case("linear", site, dense, goal=True)
        back = lambda t, n, c=columns, o=out: (draw.rows(n, o, t), draw.rows(o, c, t) * c**-0.5)  # noqa: E731
        yield Case("linear_backward", site, back, goal=True)
        for runs, dropout, bordered in ((1, 0.05, True), (1, 0.05, False), (1, 0.0, True), (sizes.runs, 0.05, True)):
            label = f"{site}, {runs} runs, dropout {dropout:g}, {'bordered' if bordered else 'plain'}"
            low = LowRankCalls(draw, columns, tuple(outs), runs, dropout, bordered)
            goal = bordered and dropout > 0
            against = "compile" if goal and runs == 1 else ""
            yield Case("lora_linear", label, low.forward, against=against, goal=goal)
            yield Case("lora_linear_backward", label, low.backward, against=against, goal=goal)
            if bordered and site != "o":
                producer, make = ("glu_down", low.activation) if site == "down" else ("rms_norm_down", low.norm)
                yield Case(producer, label, make)
            if bordered and site == "down":
                yield Case("glu_lora_backward", label, low.activation_backward, goal=goal)
            if bordered and runs == 1:
                yield Case("lora_linear_up", label, low.up)
            if not bordered:
                yield Case("lora_terms_", label, low.terms, changed=(0,))
                yield Case("lora_terms_backward_", label, low.terms_backward, changed=(0,))


@dataclass(frozen=True)
class LowRankCalls:
    """Arguments of a product with low-rank terms on all its modules."""

    draw: Draw
    columns: int
    outs: tuple[int, ...]
    runs: int
    dropout: float
    bordered: bool

    def _common(self, t: torch.dtype, n: int) -> tuple[Tensor, Tensor, list[Any], int]:
        rank, count, device = self.draw.sizes.rank, len(self.outs), self.draw.device
        border = count * self.runs * rank if self.bordered else 0
        storage = self.draw.rows(sum(self.outs) + border, self.columns + border, t)
        storage *= self.columns**-0.5
        weight = storage[: sum(self.outs), : self.columns]
        a = [self.draw.masters(self.runs, rank, self.columns) for _ in self.outs]
        b = [self.draw.masters(self.runs, out, rank) for out in self.outs]
        ends = [sum(self.outs[: m + 1]) for m in range(count)]
        rows = [i for out, end in zip(self.outs, ends, strict=True) for i in (end - out, end)]
        keys = [[stream_key(5, f"m{m}", run) for run in range(self.runs)] for m in range(count)]
        streams = torch.randint(2**45, (n,), device=device) if self.dropout else None
        factors = [a, b, [1.0] * (count * self.runs), rows, self.draw.runs(n, self.runs), self.dropout, streams]
        x = self.draw.rows(n, self.columns, t, border)
        return x, weight, [*factors, torch.tensor(keys) if self.dropout else None], border

    def forward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the forward pass."""
        x, weight, rest, border = self._common(t, n)
        return x, weight, None, *rest, border, border, 0

    def backward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the backward pass."""
        x, weight, rest, border = self._common(t, n)
        u = self.draw.rows(n, self.draw.sizes.rank * len(self.outs), t)
        return self.draw.rows(n, sum(self.outs), t, border), x, u, weight, *rest, border, True

    def norm(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the norm that makes x and u."""
        x, _, (a, _, _, _, *low), border = self._common(t, n)
        weight = self.draw.rows(1, self.columns, t)[0]
        return self.draw.rows(n, self.columns, t), x, weight, a, *low, 1e-5, 0.0, border

    def activation(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the activation that makes x and u."""
        _, _, (a, _, _, _, *low), border = self._common(t, n)
        return self.draw.rows(n, 2 * self.columns, t), "silu", a, *low, border

    def activation_backward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the backward pass of the activation and the low-rank term that read it."""
        _, _, rest, _ = self._common(t, n)
        dx, dy, gate_up, u = (
            self.draw.rows(n, width, t)
            for width in (self.columns, sum(self.outs), 2 * self.columns, self.draw.sizes.rank)
        )
        return dx, dy, gate_up, u, *rest, "silu", 0

    def up(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the forward pass where one run's u was made before, and stands beside x."""
        x, weight, (_, b, scaling, rows, runs, *_), border = self._common(t, n)
        u = self.draw.rows(n, border, t)
        x.as_strided((n, border), x.stride(), x.shape[1]).copy_(u)
        return x, u, weight, None, b, scaling, rows, runs, border, border, 0

    def terms(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the low-rank terms alone."""
        x, _, rest, _ = self._common(t, n)
        return self.draw.rows(n, sum(self.outs), t), x, *rest

    def terms_backward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the low-rank terms alone, backward."""
        x, _, rest, _ = self._common(t, n)
        u = self.draw.rows(n, self.draw.sizes.rank * len(self.outs), t)
        return self.draw.rows(n, self.columns, t), self.draw.rows(n, sum(self.outs), t), x, u, *rest, True


@dataclass(frozen=True)
class Attended:
    """Arguments of attention over a pack, with keys of learned prefixes where `learned`; window and soft cap 0 for
    none."""

    draw: Draw
    kind: str
    width: int
    window: int = 0
    softcap: float = 0.0
    learned: bool = False

    def forward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the forward pass."""
        config = self.draw.sizes.config()
        heads, kv, d = config.num_attention_heads, config.num_key_value_heads, self.width
        segments, chain = self.draw.layout(n, self.kind)
        rows = int(segments[:, 1].sum())
        qkv = self.draw.rows(rows, (heads + 2 * kv) * d, t).unflatten(1, (heads + 2 * kv, d))
        prefix: list[Tensor | None] = [None, None]
        if self.learned:
            segments, chain, count = _behind_prefixes(segments, chain, rows)
            prefix = [self.draw.masters(count, kv, d) * 10 for _ in range(2)]
        q, k, v = qkv.split([heads, kv, kv], dim=1)
        return q, k, v, *prefix, segments, chain, d**-0.5, self.window, self.softcap, 64

    def backward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the backward pass."""
        arguments = self.forward(t, n)
        out, lse = attention.FORWARD(*arguments)
        return self.draw.rows(*out.shape, t), *arguments[:5], out, lse, *arguments[5:]


def _behind_prefixes(segments: Tensor, chain: Tensor, rows: int, length: int = 20) -> tuple[Tensor, Tensor, int]:
    """The tables of sequences that each see one of two learned prefixes first, and the keys of both."""
    assert len(chain) == len(segments), "every sequence sees itself alone"
    links = [
        link
        for i, (start, count, position) in enumerate(chain.tolist())
        for link in ((rows + i % 2 * length, length, 0), (start, count, position + length))
    ]
    table = segments.clone()
    table[:, 2:] *= 2
    return table, torch.tensor(links, dtype=torch.int32), 2 * length


def attentions(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Attention over packs of several kinds, forward and backward."""
    draw, width = Draw(sizes, device), sizes.config().head_dim
    for kind, window in (("equal", 0), ("ragged", 0), ("shared prefix", 0), ("equal", max(4, sizes.length // 8))):
        label = f"{kind}{f', window {window}' if window else ''}"
        against = {"equal": "sdpa varlen flash", "ragged": "varlen flash"}.get("" if window else kind, "")
        made = Attended(draw, kind, width, window)
        yield Case("attention", label, made.forward, against=against, goal=not window)
        yield Case("attention_backward", label, made.backward, against=against, goal=not window)


def quantised(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """4-bit weights."""
    config, draw = sizes.config(), Draw(sizes, device)

    def make(t: torch.dtype, _: int) -> tuple[Any, ...]:
        rows, columns = 2 * config.intermediate_size, config.hidden_size
        codes = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device=device)
        return codes, torch.rand(rows * columns // 64, device=device), rows, columns, t

    def product(t: torch.dtype, n: int, backward: bool = False) -> tuple[Any, ...]:
        codes, absmax, rows, columns, _ = make(t, n)
        if backward:
            return draw.rows(n, rows, t), codes, absmax, columns
        return draw.rows(n, columns, t), codes, absmax / columns, rows, None, 64

    yield Case("nf4_dequantise", "gate_up", make, against="eager compile")
    yield Case("nf4_linear", "gate_up", product, against="eager compile")
    yield Case("nf4_linear", "gate_up, 1 token", lambda t, _: product(t, 1), against="eager compile")
    yield Case("nf4_linear_backward", "gate_up", lambda t, n: product(t, n, backward=True), against="eager compile")


def all_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """Every case."""
    sources = (pointwise, losses, products, attentions, quantised)
    return [case for source in sources for case in source(sizes, device)]
