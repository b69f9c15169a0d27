"""Prompt tuning: its starts, and PEFT's logits, gradients and files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftdyno.engine.adapters.prompt_tuning import PromptTuning
from peftdyno.engine.errors import UserError

from .banks import TinyModel, shake, tiny_model
from .peft_models import check_exchange, check_parity

VARIANTS = ("llama", "qwen2", "gemma3")
CONFIG = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 6}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def test_parity_with_peft(model: TinyModel) -> None:
    bank = shake(model.bank(PromptTuning(num_virtual_tokens=6)))
    check_parity(model, peft.PromptTuningConfig(**CONFIG), bank)


def test_exchange_with_peft(model: TinyModel, tmp_path: Path) -> None:
    bank = shake(model.bank(PromptTuning(num_virtual_tokens=6)))
    read = check_exchange(model, peft.PromptTuningConfig(**CONFIG), bank, tmp_path)
    assert torch.equal(read.flat, bank.flat)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {"prompt_embeddings": (6, 64)}


def embedded(model: TinyModel, ids: list[int]) -> torch.Tensor:
    """What transformers puts into the stream for these tokens."""
    with torch.no_grad():
        return model.hf.get_input_embeddings()(torch.tensor(ids))


def test_starts_from_random_rows_of_the_vocabulary(model: TinyModel) -> None:
    bank = model.bank(PromptTuning(num_virtual_tokens=40), (1, 2))
    rows = embedded(model, list(range(model.config.vocab_size)))
    found = bank.parameters["prompt_embeddings"].detach()
    picked = torch.cdist(found.flatten(0, 1), rows).argmin(1).view(2, 40)
    torch.testing.assert_close(found, rows[picked])
    assert len(set(picked[0].tolist())) > 20 and not torch.equal(picked[0], picked[1])


def test_starts_from_a_text(model: TinyModel) -> None:
    methods = [PromptTuning(num_virtual_tokens=5, init="text", text_ids=ids) for ids in ((7, 9), tuple(range(10, 20)))]
    found = model.bank(methods, (0, 0)).parameters["prompt_embeddings"].detach()
    torch.testing.assert_close(found[0], embedded(model, [7, 9, 7, 9, 7]))
    torch.testing.assert_close(found[1], embedded(model, [10, 11, 12, 13, 14]))


def test_starts_from_a_file(model: TinyModel, tmp_path: Path) -> None:
    given, path = torch.randn(3, 64), tmp_path / "start.safetensors"
    save_file({"prompt_embeddings": given}, path)
    bank = model.bank(PromptTuning(num_virtual_tokens=3, init="file", init_file=str(path)))
    assert torch.equal(bank.flat.view(3, 64), given)
    with pytest.raises(UserError, match=r"start\.safetensors.*\[4, 64\]"):
        model.bank(PromptTuning(num_virtual_tokens=4, init="file", init_file=str(path)))
    with pytest.raises(UserError, match=r"none\.safetensors"):
        model.bank(PromptTuning(num_virtual_tokens=4, init="file", init_file=str(tmp_path / "none.safetensors")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens 0"),
        ({"init": "tekst"}, "text"),
        ({"init": "text"}, "text_ids"),
        ({"text_ids": (1,)}, "init=text"),
        ({"init": "file"}, "init_file"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptTuning(**settings)


def test_a_token_outside_the_vocabulary_is_named(model: TinyModel) -> None:
    with pytest.raises(UserError, match="text_ids"):
        model.bank(PromptTuning(num_virtual_tokens=2, init="text", text_ids=(5, 131)))
