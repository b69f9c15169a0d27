"""The decoder against transformers: logits, gradients, shared prefixes, cached generation, for every family."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Pack, Sequence, build_pack, path
from peftdyno.engine.sources import load_model

from .tiny_models import VARIANTS, tiny_hf_model

PROMPTS = [(5, 9, 20, 31, 7, 8, 9, 100), (5, 9, 20, 44, 60), (5, 9, 3, 2, 77, 78, 79, 80, 81, 82, 83)]


def sequences(num_prompt: int = 4) -> list[Sequence]:
    return [Sequence(tokens=t, num_prompt=num_prompt, ordinal=i) for i, t in enumerate(PROMPTS)]


def rows_of(pack: Pack, leaf: int) -> list[int]:
    parts = [pack.segments[i] for i in path(pack.segments, leaf)]
    return [row for s in parts for row in range(s.start, s.start + s.length)]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, tmp_path_factory):
    """A transformers model and our decoder with the same weights."""
    model, folder = tiny_hf_model(request.param, tmp_path_factory.mktemp("model"))
    config, weights, _, _ = load_model(str(folder), dtype=torch.float32)
    return model, Decoder(config, weights)


def lora_bank(decoder: Decoder, seed: int = 0, **options) -> AdapterBank:
    """A bank of one run whose B is not zero, so that gradients reach A."""
    bank = AdapterBank.create(decoder.config, [LoRA(dropout=0.0, rank=3, **options)], [seed], decoder.weights)
    with torch.no_grad():
        bank.flat.add_(torch.randn(bank.flat.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.05)
    bank.begin(0, training=True)
    return bank


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("share", [False, True])
def test_logits_equal_transformers(pair, share):
    model, decoder = pair
    bank = AdapterBank.create(decoder.config, [LoRA()], [0], decoder.weights)
    bank.begin(0, training=False)
    pack = build_pack(sequences(), share_prefix=share)
    with torch.no_grad():
        ours = decoder.logits(pack, bank)
        for prompt, leaf in zip(PROMPTS, pack.leaves, strict=True):
            theirs = model(torch.tensor([prompt])).logits[0]
            assert relative(ours[rows_of(pack, leaf)], theirs) < 1e-5


def test_bf16_logits_are_as_close_to_fp32_as_those_of_transformers(pair):
    model, decoder = pair
    low = Decoder(decoder.config, _cast(decoder.weights, torch.bfloat16))
    bank = AdapterBank.create(low.config, [LoRA()], [0], low.weights)
    bank.begin(0, training=False)
    with torch.no_grad():
        exact = model(torch.tensor([PROMPTS[0]])).logits[0]
        theirs = copy.deepcopy(model).to(torch.bfloat16)(torch.tensor([PROMPTS[0]])).logits[0].float()
        ours = low.logits(build_pack(sequences()[:1]), bank).float()
    assert relative(ours, exact) < 2 * relative(theirs, exact) + 2**-8


def _cast(weights, dtype):
    layers = [
        replace(layer, **{f.name: t.to(dtype) for f in fields(layer) if (t := getattr(layer, f.name)) is not None})
        for layer in weights.layers
    ]
    embed = weights.embed.to(dtype)
    head = embed if weights.head is weights.embed else weights.head.to(dtype)
    return replace(weights, embed=embed, head=head, layers=layers, final_norm=weights.final_norm.to(dtype))


def _losses_and_gradient(decoder: Decoder, bank: AdapterBank, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    bank.zero_grad()
    losses = decoder.losses(pack, bank)
    losses.mean().backward()
    return losses.detach(), bank.gradient.clone()


def test_gradients_equal_peft(pair):
    peft = pytest.importorskip("peft")
    model, decoder = pair
    bank = lora_bank(decoder)
    losses, _ = _losses_and_gradient(decoder, bank, build_pack(sequences()))
    config = peft.LoraConfig(
        r=3, lora_alpha=16, target_modules=["k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    try:
        named = dict(wrapped.named_parameters())
        pairs = [(_peft_name(name), value) for name, value in bank.parameters.items()]
        with torch.no_grad():
            for name, value in pairs:
                named[name].copy_(value[0])
        theirs = []
        for prompt in PROMPTS:
            logits = wrapped(torch.tensor([prompt])).logits[0, 3:-1]
            theirs.append(torch.nn.functional.cross_entropy(logits, torch.tensor(prompt[4:]), reduction="none"))
        together = torch.cat(theirs)
        together.mean().backward()
        assert relative(losses, together.detach()) < 1e-5
        for name, value in pairs:
            assert relative(value.grad[0], named[name].grad) < 1e-4, name
    finally:
        wrapped.unload()
        model.requires_grad_(True)


def _peft_name(name: str) -> str:
    _, layer, module, factor = name.split(".")
    block = "mlp" if module == "down_proj" else "self_attn"
    return f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{factor}.default.weight"


def test_shared_prefix_equals_repeated_prefix(pair):
    _, decoder = pair
    bank = lora_bank(decoder)
    apart = _losses_and_gradient(decoder, bank, build_pack(sequences()))
    shared_pack = build_pack(sequences(), share_prefix=True)
    shared = _losses_and_gradient(decoder, bank, shared_pack)
    assert shared_pack.num_tokens == sum(map(len, PROMPTS)) - 4
    assert relative(shared[0], apart[0]) < 1e-5
    assert relative(shared[1], apart[1]) < 1e-5


def test_generation_equals_recomputation(pair):
    _, decoder = pair
    bank = lora_bank(decoder)
    with torch.no_grad():
        expected = [_recomputed(decoder, bank, prompt, 6) for prompt in PROMPTS]
    for share in (False, True):
        found = generate(decoder, bank, sequences(), max_new_tokens=6, eos_ids=(), share_prefix=share)
        assert found == expected
    one_by_one = [generate(decoder, bank, [s], max_new_tokens=6, eos_ids=())[0] for s in sequences()]
    assert one_by_one == expected


def test_generation_ends_at_the_end_token(pair):
    _, decoder = pair
    bank = lora_bank(decoder)
    full = generate(decoder, bank, sequences(), max_new_tokens=6, eos_ids=())
    stop = full[0][2]
    cut = generate(decoder, bank, sequences(), max_new_tokens=6, eos_ids=(stop,))
    assert cut == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in full]


def _recomputed(decoder: Decoder, bank: AdapterBank, prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    bank.begin(0, training=False)
    for _ in range(count):
        pack = build_pack([Sequence(tokens=tuple(tokens), num_prompt=len(tokens))])
        tokens.append(int(decoder.logits(pack, bank)[-1].argmax()))
    return tokens[len(prompt) :]
