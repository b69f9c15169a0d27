"""Calls that no step of the measured shape makes, on fresh random data: checked, not timed.

Forms that only tuning chooses, other heads and activations, learned prefixes, soft caps, decoding behind long contexts,
double quantisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu.cases import Attended, Case, Draw, LowRankCalls, sites
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.kernels import tuning
from peftdyno.kernels.nf4 import BLOCK, NESTED_BLOCK
from peftdyno.kernels.triton import attention_library as library


def other_cases(sizes: Sizes, device: torch.device) -> list[Case]:
    """Every case."""
    sources = (fused_products, attentions, decoding, library_attentions, activations, nested)
    return [case for source in sources for case in source(sizes, device)]


def fused_products(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The Triton product with the low-rank term inside, of one run and of several, without dropout backward, where it
    serves no other; and du and dB from one read of dy. Ranks are such that rows of every operand start at multiples of
    16 bytes."""
    draw = Draw(replace(sizes, rank=max(16, sizes.rank)), device)
    for site, (columns, outs) in sites(sizes.config()).items():
        for runs in (1, sizes.runs):
            label = f"{site}, {runs} runs, fused"
            dropped, plain = (LowRankCalls(draw, columns, tuple(outs), runs, p, False) for p in (0.05, 0.0))
            yield Case("lora_linear", label, dropped.forward, form="fused")
            yield Case("lora_linear_backward", label, plain.backward, form="fused")
            label = f"{site}, {runs} runs, dy read once"
            yield Case("lora_linear_backward", label, dropped.backward, form="together", part="lora_output_gradient")


def attentions(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Heads of other widths, scores capped where most of them feel it, and learned prefixes, forward and backward."""
    draw, width, window = Draw(sizes, device), sizes.config().head_dim, max(4, sizes.length // 8)
    calls = {
        "64 wide, shared prefix": Attended(draw, "shared prefix", 64),
        "256 wide, soft cap": Attended(draw, "ragged", 256, softcap=1.0),
        "256 wide, soft cap, window": Attended(draw, "shared prefix", 256, window, 1.0),
        "soft cap": Attended(draw, "shared prefix", width, softcap=1.0),
        "learned prefixes": Attended(draw, "ragged", width, learned=True),
        "learned prefixes, window": Attended(draw, "ragged", width, window, learned=True),
    }
    for label, made in calls.items():
        yield Case("attention", label, made.forward)
        yield Case("attention_backward", label, made.backward)


@dataclass(frozen=True)
class Decoding:
    """Arguments of a step of decoding: a few queries at the end of their keys, behind keys that all share. Contexts are
    up to four times the tokens of a check: long enough for their keys to be divided and combined."""

    draw: Draw
    window: int = 0

    def tables(self, n: int) -> tuple[Tensor, Tensor]:
        """Segments and links: n shared keys, then 4 n, 2 n + 1 and 3 keys of their own; 1, 3 and 1 queries."""
        owns, queries = (4 * n, 2 * n + 1, 3), (1, 3, 1)
        starts = [n, *(n + total for total in itertools.accumulate(owns))]
        firsts = [0, *itertools.accumulate(queries)]
        segments = [
            (first, count, 2 * i, 2 * i + 2) for i, (first, count) in enumerate(zip(firsts, queries, strict=False))
        ]
        chain = [link for start, own in zip(starts, owns, strict=False) for link in ((0, n, 0), (start, own, n))]
        return torch.tensor(segments, dtype=torch.int32), torch.tensor(chain, dtype=torch.int32)

    def forward(self, t: torch.dtype, n: int) -> tuple[Any, ...]:
        """Of the forward pass."""
        config = self.draw.sizes.config()
        heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        segments, chain = self.tables(n)
        queries, keys = int(segments[:, 1].sum()), int((chain[:, 0] + chain[:, 1]).max())
        q = self.draw.rows(queries, heads * d, t).unflatten(1, (heads, d))
        k, v = (self.draw.rows(keys, kv * d, t).unflatten(1, (kv, d)) for _ in range(2))
        return q, k, v, None, None, segments, chain, d**-0.5, self.window, 0.0, 0


def decoding(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Long contexts, all of them seen and behind a window that ends within them."""
    draw, window = Draw(sizes, device), sizes.length // 2
    yield Case("attention", "decoding", Decoding(draw).forward)
    yield Case("attention", f"decoding, window {window}", Decoding(draw, window).forward)


@dataclass(frozen=True)
class ByLibrary(Case):
    """Attention by a library; an error where it would give way to our kernels."""

    def call(self, *arguments: Any) -> Any:
        """The form."""
        if self.operator == "attention":
            q, k, v, prefix, _, *tables_and_options = arguments
        else:
            _, q, k, v, prefix, _, _, _, *tables_and_options = arguments
        segments, chain, scale, window, softcap, _ = tables_and_options
        with tuning.trial_form(self.operator, self.form):
            taken = library.chosen(self.operator, (q, k, v), prefix, (segments, chain), (scale, window, softcap))
        assert taken is not None, f"{self.form} does not serve {self.label}"
        return super().call(*arguments)


def library_attentions(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Packs without parents by each library there is; on a GPU alone."""
    draw, width, window = Draw(sizes, device), sizes.config().head_dim, max(4, sizes.length // 8)
    kinds = (("equal", 0), ("ragged", 0), ("ragged", window))
    for operator, (kind, seen) in itertools.product(("attention", "attention_backward"), kinds):
        made = Attended(draw, kind, width, seen)
        for form in library.runnable(operator, device)[1:]:
            label = f"{kind}{f', window {seen}' if seen else ''} by {form}"
            yield ByLibrary(operator, label, made.forward if operator == "attention" else made.backward, form=form)


def activations(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """GeGLU, without and with the scales of several runs."""
    config, draw = sizes.config(), Draw(sizes, device)
    f = config.intermediate_size

    def activation(t: torch.dtype, n: int, runs: int) -> tuple[Any, ...]:
        scale = draw.masters(runs, f) if runs else None
        return draw.rows(n, 2 * f, t), scale, "gelu_tanh", draw.runs(n, max(runs, 1)), 64

    for runs in (0, sizes.runs):
        label = f"gelu{f', IA3 of {runs} runs' if runs else ''}"
        yield Case("glu", label, lambda t, n, r=runs: activation(t, n, r))
        yield Case("glu_backward", label, lambda t, n, r=runs: (draw.rows(n, f, t), *activation(t, n, r)))


def nested(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Doubly quantised maxima of two modules below each other, the first of which ends within a block of maxima."""
    config = sizes.config()
    modules = [config.intermediate_size * config.hidden_size // BLOCK + extra for extra in (77, 0)]

    def make(_: torch.dtype, __: int) -> tuple[Any, ...]:
        codes = torch.randint(256, (sum(modules),), dtype=torch.uint8, device=device)
        blocks = sum(-(-size // NESTED_BLOCK) for size in modules)
        return codes, torch.rand(blocks, device=device), torch.rand(len(modules), device=device), modules

    yield Case("nf4_absmax", "gate_up", make)
