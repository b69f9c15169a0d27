"""Full fine-tuning: gradients of every weight against transformers, runs of their own, merging and files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from peftdyno.engine.adapters.full import Full
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.merge import merge_adapter
from peftdyno.engine.weights import PARTS, parameter_count

from .banks import TinyModel, backward, own_rows, pack_of, random_sequences, relative, shake, tiny_model

VARIANTS = ("llama", "llama-bias", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def transformers_gradient(model: TinyModel, name: str) -> torch.Tensor:
    """The gradient of one of our fused weights, put together from those of transformers."""
    gradients = {n: p.grad for n, p in model.hf.named_parameters()}
    layer, field = (int(name.split(".")[1]), name.split(".")[2]) if name.startswith("layers.") else (0, name)
    parts = PARTS.get(field, (f"{field}.weight",))
    return torch.cat([gradients[model.family.tensor_name(part, layer)] for part in parts])


def test_gradients_of_all_weights(model: TinyModel) -> None:
    bank = model.bank(Full())
    assert bank.trainable_count() == parameter_count(model.config)
    sequences = random_sequences([11, 6])
    (loss,) = backward(model.decoder, bank, [pack_of(bank, sequences)])
    model.hf.zero_grad()
    total = torch.zeros(())
    for s in sequences:
        rows = model.hf(torch.tensor([s.tokens])).logits[0, s.num_prompt - 1 : -1]
        total = total + cross_entropy(rows, torch.tensor(s.tokens[s.num_prompt :]), reduction="sum")
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    scale = bank.gradient.abs().max()
    for name, parameter in bank.parameters.items():
        expected = transformers_gradient(model, name)
        # The key bias shifts all scores of a query alike: its gradient is zero, and rounding is all there is of it.
        torch.testing.assert_close(parameter.grad[0], expected, rtol=1e-4, atol=2e-6 * float(scale), msg=name)


@torch.no_grad()
def test_each_run_has_weights_of_its_own_and_merges(model: TinyModel, tmp_path: Path) -> None:
    model = copy.deepcopy(model)
    bank = shake(model.bank(Full(), (1, 2)), scale=0.02)
    bank.begin(0, training=False)
    sequences = [s for run in range(2) for s in random_sequences([9, 5], run=run)]
    pack = pack_of(bank, sequences)
    found = [model.decoder.logits(pack, bank)[own_rows(pack, i)] for i in range(4)]
    save_adapter(bank, 1, tmp_path / "adapter", "base", model.family)
    read = bank_from_adapters([tmp_path / "adapter"], model.config, model.decoder.weights, model.family)
    assert torch.equal(read.flat[0], bank.flat[1])
    for run in (0, 1):
        merge_adapter(model.config, model.decoder.weights, model.family, bank, run)
        base = model.bank(Full())
        base.begin(0, training=False)
        own = pack_of(base, random_sequences([9, 5]))
        logits = model.decoder.logits(own, base)
        for i in range(2):
            assert relative(found[2 * run + i], logits[own_rows(own, i)]) <= 1e-5
