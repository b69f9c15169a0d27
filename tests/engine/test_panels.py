"""Weights kept a second time: the same answers to the bit, and nothing left behind."""

from dataclasses import replace

import pytest
import torch

from peftdyno.engine import panels
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.panels import packed_weights
from peftdyno.kernels import cpu
from peftdyno.kernels.panels import panel_bytes

from .banks import TinyModel, backward, pack_of, random_sequences, shake, small_method, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("llama", tmp_path_factory.mktemp("panels"))


def in_bf16(model: TinyModel) -> Decoder:
    weights = model.decoder.weights

    def narrow(value: object) -> object:
        return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value

    layers = [replace(layer, **{k: narrow(v) for k, v in vars(layer).items()}) for layer in weights.layers]
    named = {name: narrow(getattr(weights, name)) for name in ("embed", "final_norm", "head")}
    return Decoder(model.config, replace(weights, layers=layers, **named))


def test_same_logits(tiny: TinyModel) -> None:
    decoder = in_bf16(tiny)
    bank = shake(tiny.bank(small_method("lora")))
    bank.begin(0, training=False)
    pack = pack_of(bank, random_sequences((5, 9, 7)))
    with torch.no_grad():
        plain = decoder.logits(pack, bank)
        with packed_weights(decoder, "on") as held:
            packed = decoder.logits(pack, bank)
        after = decoder.logits(pack, bank)
    expected = sum(map(panel_bytes, [w for layer in decoder.weights.layers for w in vars(layer).values() if _wide(w)]))
    assert held == expected + panel_bytes(decoder.weights.head)
    assert torch.equal(packed, plain)
    assert torch.equal(after, plain), "the panels are still in use"
    if cpu.AVAILABLE and cpu.instruction_set() in ("amx", "avx512_bf16"):
        assert held > 0


def test_a_step_with_panels_has_the_same_gradients(tiny: TinyModel) -> None:
    """Those for the backward pass come on top."""
    decoder = in_bf16(tiny)
    bank = shake(tiny.bank(small_method("lora")))
    pack = pack_of(bank, random_sequences((5, 9, 7)))
    backward(decoder, bank, [pack])
    plain = bank.gradient.clone()
    with packed_weights(decoder, "on", backward=True) as held:
        backward(decoder, bank, [pack])
    assert torch.equal(bank.gradient, plain)
    assert held == panels.held_bytes(decoder, backward=True)
    if cpu.AVAILABLE and cpu.instruction_set() in ("amx", "avx512_bf16"):
        assert held > panels.held_bytes(decoder)


def _wide(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def test_auto_leaves_memory_free(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = in_bf16(tiny)
    monkeypatch.setattr(panels, "_free_bytes", lambda: 0)
    with packed_weights(decoder, "auto") as held:
        assert held == 0
    with packed_weights(decoder, "off") as held:
        assert held == 0


def test_fp32_has_none(tiny: TinyModel) -> None:
    with packed_weights(tiny.decoder, "on") as held:
        assert held == 0
