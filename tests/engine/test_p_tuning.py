"""P-tuning's encoders: PEFT's logits, gradients and files, and dropout from counters."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from peftdyno.engine.adapters.lstm import bidirectional
from peftdyno.engine.adapters.p_tuning import PTuning
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError

from .banks import TinyModel, shake, tiny_model
from .peft_models import check_exchange, check_parity

VARIANTS = ("llama", "qwen2", "gemma3")
N, HIDDEN = 5, 12
ENCODERS = [("lstm", 2), ("lstm", 1), ("lstm", 3), ("mlp", 2)]


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def pair(encoder: str, num_layers: int) -> tuple[PTuning, peft.PromptEncoderConfig]:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=N,
        encoder_hidden_size=HIDDEN,
        encoder_num_layers=num_layers,
        encoder_reparameterization_type=encoder.upper(),
    )
    settings = {"encoder": encoder, "num_layers": num_layers, "hidden_size": HIDDEN, "dropout": 0.0}
    return PTuning(num_virtual_tokens=N, **settings), config


@pytest.mark.parametrize(("encoder", "num_layers"), ENCODERS)
def test_parity_with_peft(model: TinyModel, encoder: str, num_layers: int) -> None:
    method, config = pair(encoder, num_layers)
    check_parity(model, config, shake(model.bank(method)))


@pytest.mark.parametrize(("encoder", "num_layers"), [("lstm", 2), ("mlp", 2)])
def test_exchange_with_peft(model: TinyModel, encoder: str, num_layers: int, tmp_path: Path) -> None:
    method, config = pair(encoder, num_layers)
    bank = shake(model.bank(method))
    read = check_exchange(model, config, bank, tmp_path)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {"prompt_embeddings": (N, 64)}
    assert method.stored_count(model.config) == N * 64 == read.trainable_count()
    assert read.method.encoder == "none"


def test_the_recurrence_equals_pytorchs() -> None:
    lstms = [torch.nn.LSTM(6, 5, bidirectional=True, batch_first=True, dtype=torch.float64) for _ in range(3)]
    stacked = [torch.stack(t).detach().requires_grad_() for t in zip(*(m.parameters() for m in lstms), strict=True)]
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    found = bidirectional(x, stacked[:4], stacked[4:])
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), [x, *stacked])
    for run, module in enumerate(lstms):
        row = x[run : run + 1].detach().requires_grad_()
        out = module(row)[0]
        torch.testing.assert_close(found[run], out[0])
        expected = torch.autograd.grad((out[0] * weight[run]).sum(), [row, *module.parameters()])
        torch.testing.assert_close(gradients[0][run], expected[0][0])
        for mine, theirs in zip(gradients[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine[run], theirs)


def test_counts_on_the_shape_of_llama_3_8b() -> None:
    config = builtin_config("llama-3-8b")
    assert PTuning().trainable_count(config) == 53_130_752
    assert PTuning(encoder="mlp").trainable_count(config) == 7_296_512
    assert PTuning().stored_count(config) == PTuning(encoder="none").trainable_count(config) == 409_600


def encoded(bank, step: int, training: bool) -> torch.Tensor:
    bank.begin(step, training=training)
    with torch.no_grad():
        return bank.virtual_embeddings().clone()


def test_dropout_is_drawn_from_seed_and_step(llama: TinyModel) -> None:
    bank = shake(llama.bank(PTuning(num_virtual_tokens=N, hidden_size=HIDDEN, dropout=0.5), (1, 2)))
    first, state = encoded(bank, 3, True), torch.get_rng_state()
    assert torch.equal(encoded(bank, 3, True), first)
    assert not torch.equal(encoded(bank, 4, True), first)
    assert torch.equal(torch.get_rng_state(), state)
    plain = encoded(bank, 3, False)
    assert torch.equal(encoded(bank, 4, False), plain) and not torch.equal(plain, first)
    alone = shake(llama.bank(PTuning(num_virtual_tokens=N, hidden_size=HIDDEN, dropout=0.5), (2,)))
    torch.testing.assert_close(encoded(alone, 3, True), first[N:])


def test_runs_may_differ_in_dropout(llama: TinyModel) -> None:
    methods = [PTuning(num_virtual_tokens=N, hidden_size=HIDDEN, dropout=p) for p in (0.0, 0.5)]
    bank = shake(llama.bank(methods, (1, 1)))
    with torch.no_grad():
        bank.flat[1] = bank.flat[0]
    first, second = encoded(bank, 0, True).chunk(2)
    plain, also_plain = encoded(bank, 0, False).chunk(2)
    assert torch.equal(first, plain) and torch.equal(plain, also_plain) and not torch.equal(second, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "gru"}, "lstm"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens 0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PTuning(**settings)
