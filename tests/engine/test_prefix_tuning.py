"""Prefix tuning, with and without its projection: PEFT's logits, gradients and files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from peftdyno.engine.adapters.prefix_tuning import PrefixTuning
from peftdyno.engine.errors import UserError

from .banks import TinyModel, shake, tiny_model
from .peft_models import check_exchange, check_parity

VARIANTS = ("llama", "qwen2", "mistral", "gemma3")
N, HIDDEN = 3, 16


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def pair(projection: bool) -> tuple[PrefixTuning, peft.PrefixTuningConfig]:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=HIDDEN, prefix_projection=projection
    )
    return PrefixTuning(num_virtual_tokens=N, hidden_size=HIDDEN, projection=projection), config


@pytest.mark.parametrize("projection", [True, False])
def test_parity_with_peft(model: TinyModel, projection: bool) -> None:
    method, config = pair(projection)
    check_parity(model, config, shake(model.bank(method)))


@pytest.mark.parametrize("projection", [True, False])
def test_exchange_with_peft(model: TinyModel, projection: bool, tmp_path: Path) -> None:
    method, config = pair(projection)
    bank = shake(model.bank(method))
    read = check_exchange(model, config, bank, tmp_path)
    width = 2 * model.config.num_hidden_layers * model.config.key_size
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {"prompt_embeddings": (N, width)}
    assert method.stored_count(model.config) == N * width == read.trainable_count()
    torch.testing.assert_close(read.flat, method.flat_prefix(bank).detach().flatten(1))


def test_sizes_below_one_are_named() -> None:
    for field in ("num_virtual_tokens", "hidden_size"):
        with pytest.raises(UserError, match=f"{field} 0"):
            PrefixTuning(**{field: 0})
