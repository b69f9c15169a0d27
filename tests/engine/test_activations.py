"""Gradients do not depend on what is kept for the backward pass: the same bits under every policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftdyno.engine.accounting.memory_predict import follow_step
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.border import lay_borders
from peftdyno.engine.optim import AdamW
from peftdyno.engine.train import TrainConfig, train

from .banks import FORMS, TinyModel, backward, pack_of, random_sequences, shake, small_method, tiny_model
from .tiny_job import job, tiny_bank, tiny_decoder

SEEDS = (3, 11)
OTHERS = [policy for policy in POLICIES if policy != "keep"]


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def gradients(model: TinyModel, bank: AdapterBank, policy: Policy) -> tuple[list[float], torch.Tensor]:
    """Losses and gradients of a step of two packs, one of them with shared prefixes."""
    packs = [
        pack_of(
            bank,
            [s for run in range(len(SEEDS)) for s in random_sequences(lengths, run=run, seed=10 * run)],
            share_prefix=share,
        )
        for lengths, share in (((9, 5, 7), True), ((4, 11), False))
    ]
    losses = backward(replace(model.decoder, activations=policy), bank, packs, step=2)
    return losses, bank.gradient.clone()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits(form: str, model: TinyModel) -> None:
    """Every method with dropout where it has it, runs together, and the last layer on label rows alone."""
    bank = shake(model.bank(small_method(form), SEEDS))
    losses, expected = gradients(model, bank, "keep")
    assert expected.abs().amax() > 0
    for policy in OTHERS:
        found = gradients(model, bank, policy)
        assert found[0] == losses
        assert torch.equal(found[1], expected), policy


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_bits_with_borders(dropout: float, tmp_path: Path) -> None:
    """Low-rank terms that join the base product in spare columns of its input."""
    model = tiny_model("llama", tmp_path)
    bank = shake(model.bank(replace(small_method("lora"), dropout=dropout), SEEDS))
    assert lay_borders(model.decoder.weights, bank) > 0
    _, expected = gradients(model, bank, "keep")
    for policy in OTHERS:
        assert torch.equal(gradients(model, bank, policy)[1], expected), policy


def test_a_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    ends = []
    for policy in POLICIES:
        decoder = replace(tiny_decoder(), activations=policy)
        bank = tiny_bank(decoder, seeds=SEEDS)
        data = [job(steps=6, seed=seed) for seed in SEEDS]
        train(decoder, bank, data, TrainConfig(micro_batch=2, evaluate_every=0.5), tmp_path / policy)
        ends.append(bank.flat.clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_each_policy_keeps_less_than_the_one_before(model: TinyModel) -> None:
    """LoRA reads normed rows and gated activations, which are pointwise results; so does every layer its input."""
    bank = model.bank(small_method("lora"))
    packs = [pack_of(bank, random_sequences([60, 60]))]
    peaks = []
    for policy in POLICIES:
        decoder = replace(model.decoder, activations=policy)
        log = follow_step(decoder, bank, AdamW.create(bank), packs)
        layers = range(model.config.num_hidden_layers - 1)
        at_the_end = next(i for i, moment in enumerate(log.moments) if moment.phase == "backward")
        held = [b for b in log.alive(at_the_end) if b.category == "activations" and b.layer in layers]
        peaks.append(sum(block.nbytes for block in held))
    assert peaks[0] > peaks[1] > peaks[2] > 0


@pytest.mark.parametrize("name", ["lora", "ia3", "prompt-tuning"])
def test_nothing_lives_on_after_a_step(model: TinyModel, name: str) -> None:
    """What a layer kept or computed again is freed without the help of the collector of cycles, also where a layer's
    second run ends early, as it does where nothing of its last product is needed."""
    bank = model.bank(small_method(name))
    packs = [pack_of(bank, random_sequences([9, 7]))]
    for policy in POLICIES:
        log = follow_step(replace(model.decoder, activations=policy), bank, AdamW.create(bank), packs)
        assert not [b for b in log.blocks if b.category == "activations" and b.died is None], policy
