"""IA3: where it scales, gradients against PEFT's autograd, the published variant, and bad settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftdyno.engine.adapters.ia3 import IA3
from peftdyno.engine.adapters.targets import peft_name, place_name
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError

from .banks import TinyModel, relative, shake, tiny_model
from .peft_adapters import check_gradients, logits_of, peft_logits

FORMS = {
    "inputs": IA3(),
    "outputs": IA3(feedforward=False),
    "everywhere": IA3(target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "single modules": IA3(target_modules=("layers.0.down_proj", "layers.1.o_proj")),
}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Llama with a bias on every attention projection, which is scaled too."""
    return tiny_model("llama-bias", tmp_path_factory.mktemp("biased"))


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_the_base_model(form: str, biased: TinyModel) -> None:
    bank = biased.bank(FORMS[form])
    assert set(bank.flat.flatten().tolist()) == {1.0}
    assert relative(logits_of(biased, bank), peft_logits(biased.hf)) <= 1e-6


@pytest.mark.parametrize(("feedforward", "count"), [(True, 524_288), (False, 196_608)])
def test_counts(feedforward: bool, count: int) -> None:
    config = builtin_config("llama-3-8b")
    assert config is not None
    method = IA3(feedforward=feedforward)
    assert method.trainable_count(config) == method.stored_count(config) == count


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_peft(form: str, biased: TinyModel, tmp_path: Path) -> None:
    method = FORMS[form]
    places = method.places(biased.config)
    names = {f"{place_name(place)}.scale": peft_name(biased.family, place, "ia3_l") for place in places}
    check_gradients(biased, shake(biased.bank(method)), names, tmp_path)


def test_a_zero_scale_switches_off_what_it_scales(biased: TinyModel) -> None:
    """Values, their bias among them, or the whole input of down_proj: the same logits as zeros in the base."""
    for form, target in (
        (IA3(target_modules=("v_proj",)), "v_proj"),
        (IA3(target_modules=("down_proj",)), "down_proj"),
    ):
        bank = biased.bank(form)
        bank.flat.zero_()
        model = biased.hf.model.layers
        kept = [p.clone() for layer in model for p in part(layer, target).parameters()]
        with torch.no_grad():
            for layer in model:
                for parameter in part(layer, target).parameters():
                    parameter.zero_()
            expected = peft_logits(biased.hf)
            for layer in model:
                for parameter in part(layer, target).parameters():
                    parameter.copy_(kept.pop(0))
        assert relative(logits_of(biased, bank), expected) <= 1e-5
        assert relative(expected, peft_logits(biased.hf)) > 0.01


def part(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    return dict(layer.named_modules())[{"v_proj": "self_attn.v_proj", "down_proj": "mlp.down_proj"}[name]]


def test_bad_settings_are_named(biased: TinyModel) -> None:
    with pytest.raises(UserError, match=r"ia3\.target_modules entry 'down'; did you mean"):
        IA3(target_modules=("down",))
    with pytest.raises(UserError, match=r"runs of one bank differ in ia3\.feedforward \(True and False\)"):
        biased.bank([FORMS["inputs"], FORMS["outputs"]], (0, 1))
