"""What holds for every method of the registry: identity at the start, gradients, runs together, cached generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence
from peftdyno.engine.sources import load_model
from peftdyno.engine.weights import empty_weights, random_weights

from .banks import (
    FORMS,
    TinyModel,
    backward,
    float64_kernels,
    own_rows,
    pack_of,
    random_sequences,
    relative,
    shake,
    small_method,
    train_steps,
)

TOLERANCE = 1e-5
NO_IDENTITY = {"prompt-tuning", "prefix-tuning", "p-tuning"}
"""Positions in front of a sequence change its logits whatever they hold."""

PUBLISHED_COUNTS = {
    "lora": 14_680_064,
    "ia3": 524_288,
    "ln-tuning": 266_240,
    "bitfit": 163_840,
    "prompt-tuning": 409_600,
    "prefix-tuning": 34_177_536,
    "p-tuning": 53_130_752,
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_defaults_train_as_many_values_as_published(name: str) -> None:
    assert METHODS[name]().trainable_count(builtin_config("llama-3-8b")) == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_the_base_model(form: str, llama: TinyModel, gemma: TinyModel) -> None:
    for model in (llama, gemma):
        bank = model.bank(small_method(form))
        bank.begin(0, training=False)
        (sequence,) = random_sequences([13])
        pack = pack_of(bank, [sequence])
        with torch.no_grad():
            found = model.decoder.logits(pack, bank)[own_rows(pack, 0)]
            expected = model.hf(torch.tensor([sequence.tokens])).logits[0]
        error = relative(found, expected)
        if FORMS[form][0] in NO_IDENTITY:
            assert error > 0.01
        else:
            assert error <= TOLERANCE
            shake(bank).begin(0, training=False)
            with torch.no_grad():
                assert relative(model.decoder.logits(pack, bank)[own_rows(pack, 0)], expected) > 100 * TOLERANCE


def batches_of(seed: int, run: int) -> list[list[list[Sequence]]]:
    """Four steps of two micro-batches, one of them empty."""
    lengths = [[(9, 5), (7,)], [(4, 11), (6,)], [(8,), ()], [(3, 3), (12,)]]
    return [
        [random_sequences(m, run=run, seed=100 * seed + 10 * s + i) for i, m in enumerate(step)]
        for s, step in enumerate(lengths)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_runs_together_equal_runs_alone(form: str, llama: TinyModel) -> None:
    """Different seeds, data and rates in one bank, dropout on: each run ends where it ends by itself."""
    method, seeds, rates = small_method(form), (3, 11, 42), (1e-3, 3e-3, 2e-3)
    together = shake(llama.bank(method, seeds))
    apart = [batches_of(seed, run) for run, seed in enumerate(seeds)]
    joined = [
        [[s for run in micro for s in run] for micro in zip(*step, strict=True)] for step in zip(*apart, strict=True)
    ]
    losses = train_steps(llama.decoder, together, joined, rates)
    for run, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        alone = shake(llama.bank(method, [seed]))
        start = alone.flat.clone()
        lonely = train_steps(llama.decoder, alone, batches_of(seed, 0), [rate])
        assert torch.allclose(torch.tensor([x[run] for x in losses]), torch.tensor(lonely)[:, 0], rtol=TOLERANCE)
        assert relative(together.flat[run], alone.flat[0]) <= TOLERANCE
        assert relative(alone.flat, start) > 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_add_up(form: str, gemma: TinyModel) -> None:
    bank = shake(gemma.bank(small_method(form), (1, 2)))
    sequences = [s for run in range(2) for s in random_sequences([9, 6, 11], run=run, seed=run)]
    backward(gemma.decoder, bank, [pack_of(bank, sequences)])
    whole = bank.gradient.clone()
    assert whole.norm() > 0
    backward(gemma.decoder, bank, [pack_of(bank, sequences[i::3]) for i in range(3)])
    assert relative(bank.gradient, whole) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_prefix_equals_repeated_ones(form: str, gemma: TinyModel) -> None:
    bank = shake(gemma.bank(small_method(form), (1, 2)))
    sequences = [s for run in range(2) for s in random_sequences([9, 6, 11], run=run, seed=run)]
    gradients, losses = [], []
    for share in (False, True):
        pack = pack_of(bank, sequences, share_prefix=share)
        losses.append(backward(gemma.decoder, bank, [pack], training=False))
        gradients.append(bank.gradient.clone())
    assert pack.num_tokens < sum(len(s.tokens) for s in sequences) + 2 * (bank.root.length if bank.root else 0)
    assert torch.allclose(*map(torch.tensor, losses), rtol=TOLERANCE)
    assert relative(*gradients) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_generation_with_a_cache_equals_one_without(form: str, variant: str, request: pytest.FixtureRequest) -> None:
    model: TinyModel = request.getfixturevalue(variant)
    bank = shake(model.bank(small_method(form), (1, 2)))
    prompts = [s for run in range(2) for s in random_sequences([9, 4, 6], run=run, seed=5 + run)]
    found = generate(model.decoder, bank, prompts, max_new_tokens=6, eos_ids=())
    assert found == [uncached(model.decoder, bank, prompt, 6) for prompt in prompts]
    assert len({tuple(tokens) for tokens in found}) > 1


@torch.no_grad()
def uncached(decoder: Decoder, bank: AdapterBank, prompt: Sequence, num_tokens: int) -> list[int]:
    """Greedy tokens, each from a forward pass over all that is before it."""
    bank.begin(0, training=False)
    tokens = prompt.tokens
    for _ in range(num_tokens):
        pack = pack_of(bank, [replace(prompt, tokens=tokens)])
        tokens = (*tokens, int(decoder.logits(pack, bank)[-1].argmax()))
    return list(tokens[len(prompt.tokens) :])


@pytest.fixture
def float64() -> Iterator[None]:
    with float64_kernels():
        yield


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("float64")
def test_gradients_equal_finite_differences(form: str) -> None:
    """Central differences along random directions, in float64, dropout on."""
    config = DecoderConfig(
        family="gemma3", vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, query_key_norm=True, post_norms=True,
        norm_offset=1.0, embedding_scale=2.0, activation="gelu_tanh", logit_softcap=3.0, sliding_window=4,
        tie_word_embeddings=True, window_layers=(True, False), rope_local_theta=100.0,
    )  # fmt: skip
    weights = random_weights(config, torch.float64, seed=3)
    decoder = Decoder(config, weights)
    bank = shake(AdapterBank.create(config, [small_method(form)] * 2, (1, 2), weights))
    sequences = [s for run in range(2) for s in random_sequences([7, 5], run=run, seed=run, vocabulary=37)]
    pack = pack_of(bank, sequences)
    backward(decoder, bank, [pack], step=4)
    gradient, step = bank.gradient.clone(), 1e-6
    for seed in range(3):
        direction = torch.randn(bank.flat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (loss_at(decoder, bank, pack, direction * step) - loss_at(decoder, bank, pack, -direction * step)) / (
            2 * step
        )
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6, abs=1e-8)


@torch.no_grad()
def loss_at(decoder: Decoder, bank: AdapterBank, pack, offset: torch.Tensor) -> float:
    bank.flat += offset
    bank.begin(4, training=True)
    loss = float(decoder.losses(pack, bank).sum())
    bank.flat -= offset
    return loss


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_nan_leaves_the_others_as_they_are(form: str, llama: TinyModel) -> None:
    bank = shake(llama.bank(small_method(form), (1, 2)))
    sequences = [s for run in range(2) for s in random_sequences([9, 6], run=run, seed=run)]
    losses = backward(llama.decoder, bank, [pack_of(bank, sequences)])
    gradient = bank.gradient.clone()
    with torch.no_grad():
        bank.flat[0] = float("nan")
    broken = backward(llama.decoder, bank, [pack_of(bank, sequences)])
    assert not torch.tensor(broken[0]).isfinite()
    assert broken[1] == losses[1]
    assert torch.equal(bank.gradient[1], gradient[1])


@pytest.mark.parametrize("form", FORMS)
def test_bf16_compute_keeps_wide_masters(form: str, llama: TinyModel) -> None:
    """Gradients of fp32 masters over a bf16 base follow those over the same base in fp32."""
    wide, narrow = (load_model(llama.folder, dtype)[1] for dtype in (torch.float32, torch.bfloat16))
    for mine, rounded in zip(wide.tensors(), narrow.tensors(), strict=True):
        mine.copy_(rounded)
    sequences = random_sequences([9, 6])
    gradients = []
    for weights in (wide, narrow):
        bank = shake(AdapterBank.create(llama.config, [small_method(form)], [1], weights), 0.01)
        backward(Decoder(llama.config, weights), bank, [pack_of(bank, sequences)], training=False)
        assert bank.flat.dtype == bank.gradient.dtype == torch.float32
        gradients.append(bank.gradient.clone())
    assert 0 < relative(gradients[1], gradients[0]) < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_weights_runs_for_its_shapes(form: str) -> None:
    config = builtin_config("qwen3-1.7b")
    weights = empty_weights(config, torch.bfloat16)
    bank = AdapterBank.create(config, [small_method(form)] * 2, (0, 1), weights)
    sequences = [s for run in range(2) for s in random_sequences([9, 6], run=run)]
    pack = pack_of(bank, sequences)
    bank.begin(0, training=True)
    losses = Decoder(config, weights).losses(pack.to("meta"), bank)
    assert losses.is_meta and losses.shape == pack.labels.index.shape
    losses.sum().backward()
    bank.finish()


def test_runs_that_differ_where_they_cannot_are_refused(llama: TinyModel) -> None:
    methods = [METHODS["prompt-tuning"](num_virtual_tokens=n) for n in (4, 5)]
    with pytest.raises(UserError, match=r"prompt-tuning\.num_virtual_tokens"):
        llama.bank(methods, (0, 1))


@st.composite
def small_configs(draw: st.DrawFn) -> DecoderConfig:
    """Decoders of two layers with all flags free."""
    kv, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 8]))
    return DecoderConfig(
        family="llama",
        vocab_size=draw(st.integers(20, 60)),
        hidden_size=draw(st.integers(2, 24)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=2,
        num_attention_heads=kv * groups,
        num_key_value_heads=kv,
        head_dim=width,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        query_key_norm=draw(st.booleans()),
        post_norms=draw(st.booleans()),
        norm_offset=draw(st.sampled_from([0.0, 1.0])),
        embedding_scale=draw(st.sampled_from([1.0, 1.5])),
        sliding_window=draw(st.sampled_from([None, 3])),
        logit_softcap=draw(st.sampled_from([None, 2.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    config=small_configs(),
    form=st.sampled_from(sorted(FORMS)),
    lengths=st.lists(st.lists(st.integers(2, 9), max_size=3), min_size=1, max_size=3).filter(any),
    common=st.integers(0, 4),
    share=st.booleans(),
    losses_only=st.booleans(),
)
def test_banks_over_random_models_and_forests(
    config: DecoderConfig, form: str, lengths: list[list[int]], common: int, share: bool, losses_only: bool
) -> None:
    """Losses and gradients of every run, in a pack of random forests, equal those of the run alone, unshared, with
    a row for every token."""
    weights = random_weights(config, torch.float64, seed=1)
    decoder, method = Decoder(config, weights), small_method(form)
    data = [
        random_sequences(n, run=j, seed=j, common=common, vocabulary=config.vocab_size) for j, n in enumerate(lengths)
    ]
    with float64_kernels():
        bank = shake(AdapterBank.create(config, [method] * len(data), range(len(data)), weights))
        pack = pack_of(bank, [s for run in data for s in run], share_prefix=share, losses_only=losses_only)
        losses = backward(decoder, bank, [pack], training=False)
        for run, sequences in enumerate(data):
            alone = shake(AdapterBank.create(config, [method], [run], weights))
            packs = [pack_of(alone, [replace(s, run=0)]) for s in sequences]
            assert backward(decoder, alone, packs, training=False) == pytest.approx([losses[run]], rel=1e-9)
            assert relative(bank.gradient[run], alone.gradient[0]) <= 1e-8


def test_starts_do_not_depend_on_the_other_runs(llama: TinyModel, tmp_path: Path) -> None:
    for form in FORMS:
        together = llama.bank(small_method(form), (5, 6))
        assert torch.equal(together.flat[1], llama.bank(small_method(form), (6,)).flat[0]), form
