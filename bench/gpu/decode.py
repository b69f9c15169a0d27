"""Section `decode`: tokens a second of one sequence, replayed and not, and prompts a second behind a shared prefix."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from peftdyno.bench.gpu.micro import measured_ceilings
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import model, release, times
from peftdyno.engine.accounting.predict import Untuned
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.generate import generate
from peftdyno.engine.graphs import EagerRecorder
from peftdyno.engine.pack import Sequence, build_pack

GRAPH = "decode, batch 1, graph"
PROMPTS = "classification prompts, shared prefix"
SAME = "replayed steps give the same tokens"
REPEATS = 5
"""Differences of two generations behind a rate."""


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """All rows, without an adapter."""
    top = measured_ceilings(section, device, tiny=tiny)
    forms = {GRAPH: "on" if device.type == "cuda" else EagerRecorder(), "decode, batch 1, no graph": "off"}
    wanted = [name for name in (*forms, PROMPTS, SAME) if section.wants(name)]
    if not wanted:
        return
    decoder, bank = model(sizes, [Untuned()], device, bordered=False)
    for name in wanted:
        with section.attempt(name):
            if name == PROMPTS:
                row = _prompts(decoder, bank, sizes, 2 if tiny else 6)
            elif name == SAME:
                row = _same(decoder, bank, sizes, list(forms.values()))
            else:
                row = _rate(decoder, bank, sizes, forms[name], top.bytes_per_second)
            section.add(name, **row)
    release(device)


def _rate(decoder: Decoder, bank: AdapterBank, sizes: Sizes, form: Any, copied: float) -> dict[str, Any]:
    """Tokens a second, and the bytes of the weights a second as a share of those that a copy moves."""
    prompt = [Sequence(tokens=tuple(range(3, 19)), num_prompt=16)]
    read = sum(t.numel() * t.element_size() for t in decoder.weights.tensors() if t is not decoder.weights.embed)
    each = _seconds_a_token(decoder, bank, prompt, sizes.new_tokens, form)
    return {"tokens_per_second": 1 / each, "of_copy_ceiling": read / each / copied}


def _same(decoder: Decoder, bank: AdapterBank, sizes: Sizes, forms: list[Any]) -> dict[str, Any]:
    """Whether every form gives the same tokens."""
    batch = [Sequence(tokens=tuple(range(3, 5 + 2 * i)), num_prompt=1, ordinal=i) for i in range(3)]
    options = {"max_new_tokens": 2 * sizes.new_tokens, "eos_ids": ()}
    found, expected = (generate(decoder, bank, batch, graphs=form, **options) for form in forms)
    return {"ok": found == expected}


def _prompts(decoder: Decoder, bank: AdapterBank, sizes: Sizes, calls: int) -> dict[str, Any]:
    """Prompt tokens a second, those of the shared prefix counted for every prompt."""
    count, shared, own = sizes.prompts
    sequences = [
        Sequence(tokens=(5,) * shared + tuple(range(3 + i, 3 + i + own)), num_prompt=shared + own - 1, ordinal=i)
        for i in range(count)
    ]
    pack = build_pack(sequences, share_prefix=True).to(decoder.device)

    @torch.no_grad()
    def call() -> None:
        bank.begin(0, training=False)
        decoder.losses(pack, bank)

    elapsed = times(call, decoder.device, calls)
    return {"prompt_tokens_per_second": count * (shared + own) / elapsed, "computed_tokens": pack.num_tokens}


def _seconds_a_token(decoder: Decoder, bank: AdapterBank, prompt: list[Sequence], count: int, graphs: Any) -> float:
    """Of `count` decoding steps: a long generation less a short one, which pays for prefill and recording too; the
    median of several such differences, for a recording takes longer than many steps and never the same time."""

    def seconds(new: int) -> float:
        began = time.perf_counter()
        generate(decoder, bank, prompt, max_new_tokens=new, eos_ids=(), graphs=graphs)
        return time.perf_counter() - began

    seconds(3)
    return statistics.median(seconds(count + 2) - seconds(2) for _ in range(REPEATS)) / count
