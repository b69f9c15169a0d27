"""LN-tuning: which norms it trains in each family, gradients against PEFT's autograd, and bad settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftdyno.engine.adapters.ln_tuning import LNTuning
from peftdyno.engine.adapters.targets import peft_name, place_name
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError

from .banks import TinyModel, relative, shake, tiny_model
from .peft_adapters import check_gradients, logits_of, peft_logits


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3-8b", (2 * 32 + 1) * 4096),
        ("mistral-7b", (2 * 32 + 1) * 4096),
        ("llama-3.2-1b", (2 * 16 + 1) * 2048),
        ("qwen3-1.7b", (2 * 28 + 1) * 2048 + 2 * 28 * 128),
        ("gemma-3-1b", (4 * 26 + 1) * 1152 + 2 * 26 * 256),
    ],
)
def test_counts(name: str, count: int) -> None:
    config = builtin_config(name)
    assert config is not None
    assert LNTuning().trainable_count(config) == count


def test_trains_every_norm_and_starts_as_the_base_model(model: TinyModel) -> None:
    bank = model.bank(LNTuning())
    norms = {name for name, _ in model.hf.named_parameters() if "norm" in name}
    trained = {peft_name(model.family, place, "weight") for place in LNTuning().places(model.config)}
    assert trained == {f"base_model.model.{name}" for name in norms}
    assert relative(logits_of(model, bank), peft_logits(model.hf)) <= 1e-6
    assert relative(logits_of(model, shake(bank)), peft_logits(model.hf)) > 1e-3


@pytest.mark.parametrize("targets", [None, ("mlp_norm", "layers.1.input_norm"), ("final_norm",)])
def test_gradients_equal_peft(targets: tuple[str, ...] | None, model: TinyModel, tmp_path: Path) -> None:
    method = LNTuning(target_modules=targets)
    places = method.places(model.config)
    names = {place_name(place): peft_name(model.family, place, "ln_tuning_layers.weight") for place in places}
    check_gradients(model, shake(model.bank(method)), names, tmp_path)


def test_bad_settings_are_named(model: TinyModel) -> None:
    with pytest.raises(UserError, match=r"ln-tuning\.target_modules entry 'norm'; did you mean"):
        LNTuning(target_modules=("norm",))
    if model.config.family == "llama":
        with pytest.raises(UserError, match=r"target 'q_norm' names no module of this model"):
            model.bank(LNTuning(target_modules=("q_norm",)))
