"""Section `decode`: tokens a second of one sequence, and prompts a second behind a shared prefix."""

from __future__ import annotations

import time

import torch

from peftdyno.bench.gpu.micro import measured_ceilings
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.step import model, release, times
from peftdyno.engine.accounting.predict import Untuned
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence, build_pack


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """Both rows, without an adapter."""
    top = measured_ceilings(section, device, tiny=tiny)
    names = ["decode, batch 1", "classification prompts, shared prefix"]
    wanted = [name for name in names if section.wants(name)]
    if not wanted:
        return
    decoder, bank = model(sizes, [Untuned()], device, bordered=False)
    if names[0] in wanted:
        prompt = [Sequence(tokens=tuple(range(3, 19)), num_prompt=16)]

        def seconds(new: int) -> float:
            began = time.perf_counter()
            generate(decoder, bank, prompt, max_new_tokens=new, eos_ids=())
            return time.perf_counter() - began

        seconds(2)
        short, long = seconds(1), seconds(sizes.new_tokens + 1)
        each = (long - short) / sizes.new_tokens
        read = sum(t.numel() * t.element_size() for t in decoder.weights.tensors() if t is not decoder.weights.embed)
        section.add(names[0], tokens_per_second=1 / each, of_copy_ceiling=read / each / top.bytes_per_second)
    if names[1] in wanted:
        count, shared, own = sizes.prompts
        sequences = [
            Sequence(tokens=(5,) * shared + tuple(range(3 + i, 3 + i + own)), num_prompt=shared + own - 1, ordinal=i)
            for i in range(count)
        ]
        pack = build_pack(sequences, share_prefix=True).to(device)

        @torch.no_grad()
        def call() -> None:
            bank.begin(0, training=False)
            decoder.losses(pack, bank)

        elapsed = times(call, device, 2 if tiny else 6)
        tokens = count * (shared + own)
        section.add(names[1], prompt_tokens_per_second=tokens / elapsed, computed_tokens=pack.num_tokens)
    release(device)
