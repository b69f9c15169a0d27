"""Whether two trainings from the same start end with the same bits: steps with dropout, several runs, shared prefixes,
and prompts that are the same to their last token, so that several labels hang on one row."""

from __future__ import annotations

import torch
from torch import Tensor

from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.border import fit_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW, OptimConfig, clip_factors, gradient_norms
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.engine.train import forward_backward
from peftdyno.engine.weights import random_weights

ROW = "two trainings end with the same bits"
STEPS, RUNS = 3, 2
TRIED = ("lora", "ia3", "ln-tuning", "bitfit")


def run(section: Section, sizes: Sizes, device: torch.device) -> None:
    """One row: how many of the methods tried ended differently."""
    if not section.wants(ROW, takes=60.0):
        return
    with section.attempt(ROW):
        packs = [_pack(sizes, seed) for seed in range(STEPS)]
        different = [name for name in TRIED if not _repeats(sizes, METHODS[name](), packs, device)]
        section.add(ROW, different=len(different), methods=different, tried=list(TRIED), ok=not different)


def _pack(sizes: Sizes, seed: int) -> Pack:
    """Half of the tokens are prompts that all sequences of a run begin with."""
    generator = torch.Generator().manual_seed(seed)
    _, length, _ = sizes.losses
    own, prompt = max(length // 8, 1), max(length // 2, 1)
    sequences = []
    for run in range(RUNS):
        shared = torch.randint(3, sizes.config().vocab_size, (prompt,), generator=generator).tolist()
        for i in range(4):
            rest = torch.randint(3, sizes.config().vocab_size, (own + i,), generator=generator).tolist()
            sequences.append(Sequence(tokens=(*shared, *rest), num_prompt=prompt, run=run, ordinal=i, weight=1 / own))
    return build_pack(sequences, num_runs=RUNS, share_prefix=True)


def _repeats(sizes: Sizes, method: Method, packs: list[Pack], device: torch.device) -> bool:
    first, second = (_train(sizes, method, packs, device) for _ in range(2))
    assert torch.isfinite(first).all(), method.name
    return torch.equal(first, second)


def _train(sizes: Sizes, method: Method, packs: list[Pack], device: torch.device) -> Tensor:
    """Masters [R, P] after the steps."""
    config = sizes.config(sizes.losses[0])
    weights = random_weights(config, torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
    bank = AdapterBank.create(config, [method] * RUNS, range(RUNS), weights)
    fit_borders(weights, bank, device)
    decoder, optimizer, settings = (
        Decoder(config, weights),
        AdamW.create(bank),
        [OptimConfig(learning_rate=1e-3)] * RUNS,
    )
    for step, pack in enumerate(packs):
        forward_backward(decoder, bank, [pack], step, Ledger(Scope(), on=False))
        clips = clip_factors(gradient_norms(bank), settings)
        optimizer.step(bank, settings, [1e-3] * RUNS, clips, [True] * RUNS)
    return bank.flat.detach().cpu()
