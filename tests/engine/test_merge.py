"""Merging: logits equal before and after, the merged model opens in transformers, and refusals say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.ia3 import IA3
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.merge import merge_adapter
from peftdyno.engine.sources import load_model
from peftdyno.engine.weight_files import save_model
from peftdyno.engine.weights import DecoderWeights

from .banks import TinyModel, relative, shake, tiny_model
from .peft_adapters import logits_of, peft_logits

TOLERANCE = 1e-5
Models = Callable[[str], TinyModel]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (variant, method, {})
        for variant in ("llama", "mistral", "qwen2", "qwen3", "gemma3")
        for method in ("lora", "ia3", "ln-tuning", "bitfit")
        if (variant, method) != ("mistral", "bitfit")
    ),
    ("llama-bias", "lora", {"dora": True, "bias": "all", "target_modules": ("q_proj", "o_proj", "up_proj")}),
    ("llama-bias", "lora", {"bias": "lora_only", "target_modules": ("q_proj", "layers.1.v_proj")}),
    ("llama", "lora", {"init": "pissa", "rank_stabilised": True, "rank_pattern": {"v_proj": 3}}),
    ("qwen2", "lora", {"lora_bias": True, "target_modules": ("q_proj", "v_proj"), "alpha_pattern": {"q_proj": 2.0}}),
    ("llama-bias", "ia3", {"feedforward": False, "target_modules": ("q_proj", "o_proj", "down_proj")}),
    ("gemma3", "bitfit", {"target_modules": ("o_proj",)}),
    ("llama-tied", "bitfit", {"target_modules": ("layers.1.k_proj",)}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Each variant, made once."""
    return cache(lambda variant: tiny_model(variant, tmp_path_factory.mktemp(variant)))


def method_of(name: str, settings: dict[str, Any]) -> Method:
    return METHODS[name](**({"rank": 4, "dropout": 0.0} if name == "lora" else {}), **settings)


def merged(model: TinyModel, bank: AdapterBank, run: int = 0) -> tuple[DecoderConfig, DecoderWeights]:
    """A run folded into fresh weights."""
    config, weights, _, _ = load_model(model.folder)
    return merge_adapter(config, weights, model.family, bank, run), weights


def without_adapter(model: TinyModel, config: DecoderConfig, weights: DecoderWeights) -> torch.Tensor:
    """Logits of plain weights; an IA3 bank at its start changes nothing."""
    plain = replace(model, decoder=Decoder(config, weights))
    return logits_of(plain, plain.bank(IA3()))


@pytest.mark.parametrize(("variant", "name", "settings"), CASES)
def test_logits_are_equal_before_and_after(
    variant: str, name: str, settings: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    """Here, and in transformers after the merged model was saved."""
    model = models(variant)
    bank = shake(model.bank(method_of(name, settings)))
    expected = logits_of(model, bank)
    assert relative(expected, peft_logits(model.hf)) > 1e-3
    config, weights = merged(model, bank)
    assert relative(without_adapter(model, config, weights), expected) <= TOLERANCE
    save_model(tmp_path / "merged", weights, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative(peft_logits(theirs.eval()), expected) <= TOLERANCE


def test_each_run_merges_its_own(models: Models) -> None:
    model = models("llama")
    methods = [METHODS["lora"](rank=rank, alpha=alpha) for rank, alpha in ((2, 3.0), (5, 8.0))]
    bank = shake(model.bank(methods, (1, 2)))
    for run in range(2):
        assert relative(without_adapter(model, *merged(model, bank, run)), logits_of(model, bank, run=run)) <= TOLERANCE


@pytest.mark.parametrize(
    ("variant", "name", "settings", "message"),
    [
        ("mistral", "bitfit", {}, r"cannot merge biases into q_proj, v_proj: a Mistral checkpoint has no place"),
        ("qwen2", "bitfit", {"target_modules": ("o_proj",)}, r"into o_proj: a Qwen2 checkpoint has biases on queries"),
        ("llama", "bitfit", {"target_modules": ("q_proj", "up_proj")}, r"cannot merge a bias into up_proj"),
        ("llama", "lora", {"lora_bias": True}, r"cannot merge a bias into down_proj"),
        ("llama", "prompt-tuning", {"num_virtual_tokens": 2}, r"prompt-tuning.*cannot be merged"),
        ("llama", "prefix-tuning", {"num_virtual_tokens": 2, "hidden_size": 4}, r"prefix-tuning.*cannot be merged"),
        ("llama", "adapter", {}, r"adapter.*cannot be merged"),
    ],
)
def test_what_cannot_be_merged_says_why_and_changes_nothing(
    variant: str, name: str, settings: dict[str, Any], message: str, models: Models
) -> None:
    model = models(variant)
    bank = shake(model.bank(method_of(name, settings)))
    config, weights, _, _ = load_model(model.folder)
    before = [tensor.clone() for tensor in weights.tensors()]
    with pytest.raises(UserError, match=message):
        merge_adapter(config, weights, model.family, bank, 0)
    after = weights.tensors()
    assert len(before) == len(after)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
