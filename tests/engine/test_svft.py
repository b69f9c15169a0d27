"""SVFT: the product against its dense formula, merging, and adapters that know their base weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import module_weight
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.adapters.svft import SVFT, singular_bases
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.merge import merge_adapter
from peftdyno.engine.weights import empty_weights

from .banks import TinyModel, pack_of, random_sequences, relative, shake, tiny_model

TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return tiny_model("llama-bias", tmp_path)


@torch.no_grad()
def logits(decoder: Decoder, bank: AdapterBank) -> torch.Tensor:
    bank.begin(0, training=False)
    sequences = [s for run in range(bank.num_runs) for s in random_sequences([9, 5], run=run)]
    return decoder.logits(pack_of(bank, sequences), bank)


def test_bases_are_orthonormal_and_rebuild_the_weight() -> None:
    for shape in ((12, 7), (7, 12), (9, 9)):
        weight = torch.randn(shape)
        left, right = singular_bases(weight)
        identity = torch.eye(min(shape))
        torch.testing.assert_close(left.t() @ left, identity, atol=1e-5, rtol=0)
        torch.testing.assert_close(right @ right.t(), identity, atol=1e-5, rtol=0)
        inner = left.t() @ weight @ right.t()
        torch.testing.assert_close((left * inner.diagonal()) @ right, weight, atol=1e-5, rtol=1e-5)
        assert torch.equal(inner.diagonal(), inner.diagonal().sort(descending=True).values)


def test_logits_equal_those_of_the_dense_update(model: TinyModel, tmp_path: Path) -> None:
    """Each run's transformers model with U diag(m) V^T added to its weights."""
    bank = shake(model.bank(SVFT(target_modules=TARGETS), (1, 2)))
    found = logits(model.decoder, bank)
    for run in range(2):
        hf = tiny_model("llama-bias", tmp_path / str(run)).hf
        with torch.no_grad():
            for layer, block in enumerate(hf.model.layers):
                for module in TARGETS:
                    linear = getattr(block.mlp if module in ("gate_proj", "down_proj") else block.self_attn, module)
                    left, _, right = torch.linalg.svd(linear.weight, full_matrices=False)
                    sign = torch.tensor([1.0, -1.0]).repeat(len(right))[: len(right)]
                    m = bank.parameters[f"layers.{layer}.{module}.m"][run]
                    linear.weight += (left * sign * m) @ (right * sign[:, None])
            rows = torch.cat([hf(torch.tensor([s.tokens])).logits[0] for s in random_sequences([9, 5])])
        assert relative(found[14 * run : 14 * (run + 1)], rows) <= 1e-5


def test_merged_weights_give_the_same_logits(model: TinyModel) -> None:
    bank = shake(model.bank(SVFT(target_modules=TARGETS)))
    before = logits(model.decoder, bank)
    plain = model.bank(SVFT(target_modules=TARGETS))
    merge_adapter(model.config, model.decoder.weights, model.family, bank, 0)
    assert relative(logits(model.decoder, plain), before) <= 1e-5


def test_an_adapter_is_small_and_belongs_to_its_base(model: TinyModel, tmp_path: Path) -> None:
    bank = shake(model.bank(SVFT(target_modules=TARGETS)))
    save_adapter(bank, 0, tmp_path / "adapter", "base", model.family)
    read = bank_from_adapters([tmp_path / "adapter"], model.config, model.decoder.weights, model.family)
    assert torch.equal(read.flat, bank.flat) and read.methods == bank.methods
    assert torch.equal(logits(model.decoder, read), logits(model.decoder, bank))
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size <= 4 * 4 * bank.trainable_count()
    module_weight(model.decoder.weights, model.config, 1, "gate_proj")[0, 0] += 1e-3
    with pytest.raises(UserError, match="load the base model that it was trained on"):
        bank_from_adapters([tmp_path / "adapter"], model.config, model.decoder.weights, model.family)


def test_a_model_without_weights_has_shapes(model: TinyModel) -> None:
    bank = AdapterBank.create(model.config, [SVFT()], [0], empty_weights(model.config))
    assert bank.trainable_count() == model.config.num_hidden_layers * (32 + 32 + 64)
    assert bank.method.weights_sha256 == ""


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(UserError, match="q_proj"):
        SVFT(target_modules=("q_pro",))


def test_inference_reads_the_bases(model: TinyModel) -> None:
    method = SVFT(target_modules=TARGETS)
    bank = model.bank(method)
    bases = sum(t.numel() for value in bank.buffers.values() if isinstance(value, tuple) for t in value)
    assert method.inference_count(model.config) == bases + method.trainable_count(model.config)
