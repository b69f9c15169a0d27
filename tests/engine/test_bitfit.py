"""BitFit: biases beside those of the base, gradients against PEFT's autograd, and its LORA form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftdyno.engine.adapters.bitfit import BitFit
from peftdyno.engine.adapters.peft_format import load_adapter
from peftdyno.engine.adapters.targets import peft_name, place_name
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError

from .banks import TinyModel, relative, shake, tiny_model
from .peft_adapters import check_gradients, in_peft, logits_of, peft_logits, saved

FORMS = {
    "default": BitFit(),
    "everywhere": BitFit(target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "single modules": BitFit(target_modules=("layers.1.k_proj", "layers.2.up_proj")),
}


@pytest.fixture(scope="module", params=["mistral", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Without biases, and with them on queries, keys and values."""
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_the_base_model(form: str, model: TinyModel) -> None:
    bank = model.bank(FORMS[form])
    assert not bank.flat.any()
    assert relative(logits_of(model, bank), peft_logits(model.hf)) <= 1e-6
    assert relative(logits_of(model, shake(bank)), peft_logits(model.hf)) > 1e-3


def test_counts() -> None:
    """163,840 biases; PEFT's form has zeros of A and B beside them."""
    config = builtin_config("llama-3-8b")
    assert config is not None
    assert BitFit().trainable_count(config) == 163_840
    assert BitFit().stored_count(config) == 163_840 + 32 * (4096 + 4096 + 4096 + 1024)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_peft(form: str, model: TinyModel, tmp_path: Path) -> None:
    method = FORMS[form]
    places = method.places(model.config)
    names = {f"{place_name(place)}.bias": peft_name(model.family, place, "lora_B.bias") for place in places}
    check_gradients(model, shake(model.bank(method)), names, tmp_path)


def test_its_form_is_lora_with_biases_alone(model: TinyModel, tmp_path: Path) -> None:
    bank = shake(model.bank(BitFit()))
    folder = saved(model, bank, tmp_path)
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_bias"]) == ("LORA", 1, 1, True)
    assert sum(t.numel() for t in tensors.values()) == BitFit().stored_count(model.config)
    assert not any(t.any() for name, t in tensors.items() if not name.endswith("lora_B.bias"))
    assert torch.equal(logits_of(model, bank).argmax(-1), peft_logits(in_peft(model, folder)).argmax(-1))
    method, values = load_adapter(folder, model.config, model.family)
    assert method == BitFit()
    assert all(torch.equal(values[name], tensor) for name, tensor in bank.run_tensors(0).items())


def test_a_factor_that_is_not_zero_makes_it_lora(model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = saved(model, shake(model.bank(BitFit())), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name][0, 0] = 1.0
    save_file(tensors, folder / "adapter_model.safetensors")
    method, _ = load_adapter(folder, model.config, model.family)
    assert method.name == "lora"


def test_bad_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"bitfit\.target_modules entry 'query'"):
        BitFit(target_modules=("query",))
