"""Borders are laid where products take the bordered form, and only there; predictions have the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from peftdyno.engine.accounting.memory_predict import training_memory
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.border import fit_borders, lay_borders
from peftdyno.engine.families import config_from_hf
from peftdyno.engine.weights import DecoderWeights, random_weights
from peftdyno.kernels import dispatch, tuning

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FIELDS = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48}
FIELDS |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
FIELDS |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIG = config_from_hf(FIELDS)
LORA = METHODS["lora"](rank=3, target_modules=("q_proj", "v_proj", "down_proj"))  # type: ignore[call-arg]
ROOM = {"qkv": 16, "o": 0, "gate_up": 0, "down": 8}
"""Ranks of two runs, 12 and 6, to whole groups of eight."""


@pytest.fixture
def weights() -> DecoderWeights:
    return random_weights(CONFIG, torch.float32)


@pytest.fixture(autouse=True)
def choice() -> Iterator[None]:
    before = dispatch.current()
    yield
    dispatch.use(before)


def bank_of(weights: DecoderWeights, name: str = "lora") -> AdapterBank:
    method = LORA if name == "lora" else METHODS[name]()
    return AdapterBank.create(CONFIG, [method] * 2, [0, 1], weights)


def room(weights: DecoderWeights, layer: int = 1) -> dict[str, int]:
    found = {}
    for site in SITES:
        weight: Tensor = getattr(weights.layers[layer], site)
        found[site] = weight.stride(0) - weight.shape[1]
    return found


def test_a_cpu_has_none(weights: DecoderWeights) -> None:
    before, bank = weights.tensors(), bank_of(weights)
    assert fit_borders(weights, bank, CPU) == 0 and not bank.bordered
    assert all(a is b for a, b in zip(weights.tensors(), before, strict=True))


def test_a_gpu_has_them_where_terms_are_added(weights: DecoderWeights) -> None:
    values, bank = [t.clone() for t in weights.tensors()], bank_of(weights)
    added = fit_borders(weights, bank, GPU)
    assert room(weights) == room(weights, 0) == ROOM
    assert bank.bordered == {(i, site) for i in range(2) for site in ("qkv", "down")}
    assert added == 4 * sum(
        (out + spare) * (columns + spare) - out * columns
        for layer in weights.layers
        for site, spare in ROOM.items()
        for out, columns in [getattr(layer, site).shape]
    )
    assert all(torch.equal(a, b) for a, b in zip(weights.tensors(), values, strict=True))


def test_another_bank_finds_its_own_borders(weights: DecoderWeights) -> None:
    first = bank_of(weights)
    assert lay_borders(weights, first) > 0 and lay_borders(weights, first) == 0
    other = bank_of(weights, "ia3")
    assert fit_borders(weights, other, GPU) < 0 and not other.bordered
    assert set(room(weights).values()) == {0}


def test_no_border_where_another_form_was_measured(weights: DecoderWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    out, columns = weights.layers[0].qkv.shape
    forms = {
        tuning.shape_class(f"lora_linear{direction}", (tokens, columns, out, 12)): "plain"
        for direction in ("", "_backward")
        for tokens in (512, 4096)
    }
    monkeypatch.setattr(tuning, "measured", lambda device: tuning.Measured({}, forms))
    fit_borders(weights, bank_of(weights), GPU)
    assert room(weights) == ROOM | {"qkv": 0}
    forms[tuning.shape_class("lora_linear", (4096, columns, out, 12))] = "bordered"
    fit_borders(weights, bank_of(weights), GPU)
    assert room(weights) == ROOM


def test_no_border_for_the_reference(weights: DecoderWeights) -> None:
    dispatch.use("reference")
    assert fit_borders(weights, bank_of(weights), GPU) == 0
    assert set(room(weights).values()) == {0}


def test_a_prediction_has_the_borders_of_a_training() -> None:
    def peak(device: str, bordered: bool | None) -> int:
        job = Job(config=CONFIG, methods=(LORA,) * 2, device=device, bordered=bordered)
        return training_memory(job, [job.plain_pack(2, 9)]).peak_bytes

    gpu, bare = peak("cuda", True), peak("cuda", False)
    assert gpu > bare
    assert peak("cuda", None) == gpu
    assert peak("cpu", None) == peak("cpu", False)
    dispatch.use("reference")
    assert peak("cuda", None) == peak("cuda", False)
