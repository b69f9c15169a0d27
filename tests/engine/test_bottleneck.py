"""Bottleneck adapters: both modes against hooks in transformers, places, files and settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from peftdyno.engine.adapters.bottleneck import Bottleneck
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError
from peftdyno.engine.merge import merge_adapter

from .banks import TinyModel, backward, pack_of, random_sequences, relative, shake, tiny_model

FORMS = [
    Bottleneck(reduction=8),
    Bottleneck(reduction=8, mode="parallel", activation="relu", scaling=4.0),
    Bottleneck(reduction=8, places=("mlp",), activation="gelu"),
]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def hooked(method: Bottleneck, p: dict[str, Tensor], prefix: str) -> Callable[..., Any]:
    """A forward hook that adds the adapter to a transformers module's output."""
    functions = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        x = output[0] if isinstance(output, tuple) else output
        source = entered if method.mode == "parallel" else x
        inner = functions[method.activation](linear(source, p[prefix + "down"], p[prefix + "down_bias"]))
        x = x + method.scaling * linear(inner, p[prefix + "up"], p[prefix + "up_bias"])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


@pytest.mark.parametrize("method", FORMS, ids=str)
def test_gradients_equal_those_of_hooks_in_transformers(model: TinyModel, method: Bottleneck) -> None:
    bank = shake(model.bank(method))
    sequences = random_sequences([11, 6])
    (loss,) = backward(model.decoder, bank, [pack_of(bank, sequences)])
    theirs = {name: t.clone().requires_grad_() for name, t in bank.run_tensors(0).items()}
    handles = []
    for i, block in enumerate(model.hf.model.layers):
        for place, module in (("attention", block.self_attn), ("mlp", block.mlp)):
            if place in method.places:
                hook = hooked(method, theirs, f"layers.{i}.{place}.")
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
    total = torch.zeros(())
    for s in sequences:
        rows = model.hf(torch.tensor([s.tokens])).logits[0, s.num_prompt - 1 : -1]
        total = total + cross_entropy(rows, torch.tensor(s.tokens[s.num_prompt :]), reduction="sum")
    total.backward()
    for handle in handles:
        handle.remove()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, tensor in theirs.items():
        assert relative(bank.parameters[name].grad[0], tensor.grad) <= 1e-5, name


def test_count_on_the_shape_of_llama_3_8b() -> None:
    inner, width = 4096 // 16, 4096
    assert Bottleneck().trainable_count(builtin_config("llama-3-8b")) == 32 * 2 * (2 * inner * width + inner + width)


def test_an_adapter_reads_back(model: TinyModel, tmp_path: Path) -> None:
    bank = shake(model.bank(FORMS[1]))
    save_adapter(bank, 0, tmp_path / "adapter", "base", model.family)
    read = bank_from_adapters([tmp_path / "adapter"], model.config, model.decoder.weights, model.family)
    assert torch.equal(read.flat, bank.flat) and read.methods == bank.methods
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size <= 4 * 4 * bank.trainable_count()


def test_merging_is_refused_with_the_reason(model: TinyModel) -> None:
    with pytest.raises(UserError, match="activation"):
        merge_adapter(model.config, model.decoder.weights, model.family, model.bank(FORMS[0]), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "serial"}, "sequential"),
        ({"activation": "tan"}, "tanh"),
        ({"places": ("mpl",)}, "mlp"),
        ({"places": ()}, "places is empty"),
        ({"reduction": 0}, "reduction 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Bottleneck(**settings)
