"""Losses of a LoRA run's first steps beside those of transformers + PEFT: the same weights, batch and optimizer."""

from __future__ import annotations

import gc
from typing import Any

import torch

from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.adapters.method import MODULES
from peftdyno.engine.border import lay_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.families import family_of
from peftdyno.engine.optim import AdamW, OptimConfig, clip_factors, gradient_norms
from peftdyno.engine.pack import Sequence, build_pack
from peftdyno.engine.train import forward_backward
from peftdyno.engine.weight_files import to_state_dict
from peftdyno.engine.weights import DecoderWeights, random_weights

RATE = 1e-3


def row_name(sizes: Sizes) -> str:
    """The row at these sizes."""
    layers, _, steps = sizes.losses
    return f"losses of {steps} steps against HF + PEFT, {layers} layers"


def run(section: Section, sizes: Sizes, device: torch.device) -> None:
    """One row; wrong where our losses are further from those in fp32 than twice what theirs are."""
    name = row_name(sizes)
    if section.wants(name, takes=90.0):
        with section.attempt(name):
            section.add(name, **_row(sizes, device))


def _row(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    layers, length, steps = sizes.losses
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = sizes.config(layers)
    weights = random_weights(config, dtype, device=device)
    lora = METHODS["lora"](rank=sizes.rank, alpha=2 * sizes.rank, target_modules=tuple(MODULES), dropout=0.0)  # type: ignore[call-arg]
    assert isinstance(lora, LoRA)
    bank = AdapterBank.create(config, [lora], [0], weights)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.vocab_size, (sizes.sequences, length), generator=generator)
    plain, truth = (_theirs(sizes, weights, bank, lora, tokens, kind, steps) for kind in (dtype, torch.float32))
    found = _ours(weights, bank, tokens, steps)
    ours, theirs = ((values - truth).norm().item() for values in (found, plain))
    allowed = max(2 * theirs, 1e-5 * truth.norm().item())
    return {
        "first": found[0].item(),
        "last": found[-1].item(),
        "ours_from_fp32": ours,
        "theirs_from_fp32": theirs,
        "error_over_budget": ours / allowed,
        "ok": ours <= allowed,
    }


def _ours(weights: DecoderWeights, bank: AdapterBank, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Loss before each update; the weights are bordered from here on."""
    lay_borders(weights, bank)
    decoder, optimizer = Decoder(bank.config, weights), AdamW.create(bank)
    weight = 1.0 / (tokens.shape[0] * (tokens.shape[1] - 1))
    rows = enumerate(tokens.tolist())
    sequences = [Sequence(tokens=tuple(row), num_prompt=1, ordinal=i, weight=weight) for i, row in rows]
    pack, config = build_pack(sequences), OptimConfig(learning_rate=RATE)
    losses = []
    for step in range(steps):
        (loss,), _ = forward_backward(decoder, bank, [pack], step, Ledger(Scope(), on=False))
        clips = clip_factors(gradient_norms(bank), [config])
        optimizer.step(bank, [config], [RATE], clips, [True])
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def _theirs(
    sizes: Sizes,
    weights: DecoderWeights,
    bank: AdapterBank,
    lora: LoRA,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    steps: int,
) -> torch.Tensor:
    """Loss before each update by transformers and PEFT, from the same start."""
    import peft
    import transformers

    config, device = bank.config, weights.embed.device
    fields: dict[str, Any] = dict(sizes.fields) | {"num_hidden_layers": config.num_hidden_layers}
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**fields), dtype=dtype, attn_implementation="sdpa"
        )
    base.load_state_dict(to_state_dict(weights, config))
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(MODULES))
    tuned = peft.get_peft_model(base, settings)
    named = dict(tuned.named_parameters())
    with torch.no_grad():
        for ours, name in lora.peft_names(config, family_of(config)).items():
            named[name.replace(".weight", ".default.weight")].copy_(bank.parameters[ours][0])
    trained = [p for p in tuned.parameters() if p.requires_grad]
    defaults = OptimConfig(learning_rate=RATE)
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=defaults.eps, weight_decay=defaults.weight_decay)
    placed, losses = tokens.to(device), []
    for _ in range(steps):
        loss = tuned(input_ids=placed, labels=placed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, defaults.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    del tuned, base, optimizer
    gc.collect()
    return torch.tensor(losses, dtype=torch.float64)
