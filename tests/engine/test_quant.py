"""Four-bit bases: what is stored, that products and adapters are those of the dequantised model, and PEFT's QLoRA."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job, run_step, training_step
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.ia3 import IA3
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.adapters.method import MODULES, SITES, Method, module_weight
from peftdyno.engine.border import lay_borders
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import family_of
from peftdyno.engine.generate import generate
from peftdyno.engine.merge import merge_adapter
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Sequence
from peftdyno.engine.quant import (
    QUANTISATIONS,
    dequantise_weights,
    load_quantised_weights,
    quantise_weights,
)
from peftdyno.engine.sources import load_model
from peftdyno.engine.weight_files import SafetensorsSource, save_model
from peftdyno.engine.weights import DecoderWeights, empty_weights, random_weights
from peftdyno.kernels.nf4 import NestedAbsmax, Nf4Weight, quantise, stacked

from .banks import FORMS, TinyModel, backward, pack_of, random_sequences, relative, shake, small_method, tiny_model
from .tiny_models import SHAPE, VARIANTS

KINDS = sorted(QUANTISATIONS)
EVERYWHERE = LoRA(rank=4, dropout=0.0, target_modules=MODULES)
PROMPTS = ((5, 17, 99, 23, 42, 8, 11, 64, 3), (5, 17, 30, 31))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A dense model with biases on its projections and a tied head."""
    return tiny_model("qwen2", tmp_path_factory.mktemp("quant"))


def linear_weights(weights: DecoderWeights) -> list[Nf4Weight]:
    """Every fused weight of quantised layers."""
    found = [getattr(layer, site) for layer in weights.layers for site in SITES]
    assert all(isinstance(weight, Nf4Weight) for weight in found)
    return found


def new_bank(
    config: DecoderConfig, method: Method, weights: DecoderWeights, seeds: SequenceOf[int] = (0,)
) -> AdapterBank:
    """A bank at its start, a run for each seed."""
    return AdapterBank.create(config, [method] * len(seeds), seeds, weights)


def same(a: DecoderWeights, b: DecoderWeights) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_are_quantised_apart_and_the_rest_stays(model: TinyModel, kind: str) -> None:
    dense, config = model.decoder.weights, model.config
    weights = quantise_weights(dense, config, kind)
    nested = QUANTISATIONS[kind]
    for layer in range(config.num_hidden_layers):
        for module in MODULES:
            apart = quantise(module_weight(dense, config, layer, module), nested=nested).dense()
            assert torch.equal(module_weight(weights, config, layer, module), apart)
        assert weights.layers[layer].qkv_bias is dense.layers[layer].qkv_bias
        assert weights.layers[layer].mlp_norm is dense.layers[layer].mlp_norm
    assert weights.embed is dense.embed and weights.head is dense.head and weights.final_norm is dense.final_norm
    assert isinstance(dense.layers[0].qkv, Tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loading_quantises_what_loading_gives(model: TinyModel, kind: str, dtype: torch.dtype) -> None:
    config, dense, _, files = load_model(model.folder, dtype)
    expected = quantise_weights(dense, config, kind)
    found = load_model(model.folder, dtype, quant=kind)[1]
    assert same(found, expected) and found.head is found.embed
    assert {weight.dtype for weight in linear_weights(found)} == {dtype}
    sizes = quantise_weights(empty_weights(config, dtype), config, kind)
    assert sizes.num_bytes() == found.num_bytes() < dense.num_bytes()
    assert files.name == str(model.folder)


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_every_family_loads(variant: str, tmp_path: Path) -> None:
    folder = tiny_model(variant, tmp_path).folder
    config, dense, _, _ = load_model(folder)
    assert same(load_model(folder, quant="nf4")[1], quantise_weights(dense, config, "nf4"))


class WatchedSource:
    """A source that knows which of the linear weights it gave are still alive when the next tensor is asked for."""

    def __init__(self, source: SafetensorsSource) -> None:
        self.source = source
        self.given: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.source.shapes()

    def place(self, name: str | None = None) -> str:
        return self.source.place(name)

    def read(self, name: str) -> Tensor:
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.given))
        tensor = self.source.read(name)
        if "proj.weight" in name:
            self.given.append(weakref.ref(tensor))
        return tensor


def test_loading_holds_one_dense_weight_at_most(model: TinyModel) -> None:
    source = WatchedSource(SafetensorsSource([model.folder / "model.safetensors"]))
    load_quantised_weights(model.config, source, "nf4")
    assert len(source.given) == len(MODULES) * model.config.num_hidden_layers
    assert source.most_alive <= 1


class DenseWeights(TorchDispatchMode):
    """Counts how often a weight is dequantised, and the most dequantised weights that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: SequenceOf[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._opname == "nf4_dequantise":
            self.made.append(weakref.ref(result))
            self.most = max(self.most, self.alive())
        return result


@pytest.mark.parametrize("method", [EVERYWHERE, IA3()], ids=["lora", "ia3"])
def test_nothing_dense_is_kept(model: TinyModel, method: Method) -> None:
    config = model.config
    weights = quantise_weights(model.decoder.weights, config, "nf4")
    decoder, bank = Decoder(config, weights), new_bank(config, method, weights)
    bank.begin(0, training=True)
    with DenseWeights() as watch:
        losses = decoder.losses(pack_of(bank, random_sequences([9, 12])), bank)
        assert len(watch.made) == len(linear_weights(weights)) and watch.alive() == 0
        losses.sum().backward()
        assert len(watch.made) > len(linear_weights(weights)) and watch.alive() == 0
    assert watch.most == 1


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"full"}))
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_acts_as_on_the_dequantised_model(model: TinyModel, form: str, kind: str) -> None:
    config, method = model.config, small_method(form)
    quantised = quantise_weights(model.decoder.weights, config, kind)
    results = []
    for weights in (quantised, dequantise_weights(quantised)):
        bank = shake(new_bank(config, method, weights, (0, 1)))
        sequences = random_sequences([9, 12]) + random_sequences([7], run=1, seed=1)
        losses = backward(Decoder(config, weights), bank, [pack_of(bank, sequences)])
        results.append((losses, bank.gradient))
    (losses, gradient), (expected, expected_gradient) = results
    assert losses == expected and torch.equal(gradient, expected_gradient) and float(gradient.norm()) > 0


@pytest.mark.parametrize(
    "method",
    [EVERYWHERE, replace(EVERYWHERE, dora=True), small_method("svft")],
    ids=["lora", "dora", "svft"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_predicted(model: TinyModel, method: Method, kind: str) -> None:
    config = model.config
    weights = quantise_weights(model.decoder.weights, config, kind)
    assert weights.quantisation == kind and model.decoder.weights.quantisation is None
    decoder, bank = Decoder(config, weights), new_bank(config, method, weights)
    pack, ledger = pack_of(bank, random_sequences([9, 12])), Ledger.of(decoder, bank)
    run_step(decoder, bank, AdamW.create(bank), [pack], ledger)
    assert ledger.subject is not None and ledger.counter is not None
    job = Job(config=config, methods=(method,), dtype=torch.float32, quant=ledger.subject.quant)
    counted = ledger.counter.tally
    assert counted.charges == training_step(job, [pack]).charges
    dequantised = counted.by("owner", "operator")["base", "nf4_dequantise"]
    sizes = [weight.shape[0] * weight.shape[1] for weight in linear_weights(weights)]
    assert dequantised.pointwise >= 2 * sum(sizes) - sizes[0]  # nothing may need the gradient of the first input


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"dora": True, "init": "pissa"}], ids=str)
def test_lora_derives_from_the_dequantised_weights(model: TinyModel, options: dict[str, Any]) -> None:
    config = model.config
    quantised = quantise_weights(model.decoder.weights, config, "nf4")
    gradients = []
    for weights in (quantised, dequantise_weights(quantised)):
        bank = shake(new_bank(config, replace(EVERYWHERE, **options), weights))
        backward(Decoder(config, weights), bank, [pack_of(bank, random_sequences([9, 12]))])
        gradients.append(bank.gradient)
        large = [v for v in bank.buffers.values() if isinstance(v, Tensor) and v.numel() >= config.hidden_size**2]
        assert not large
    assert torch.equal(*gradients)


def test_generation_and_borders(model: TinyModel) -> None:
    config = model.config
    quantised = quantise_weights(model.decoder.weights, config, "nf4")
    dense = dequantise_weights(quantised)
    found = []
    for weights in (quantised, dense):
        bank = shake(new_bank(config, EVERYWHERE, weights))
        added = lay_borders(weights, bank)
        assert (added == 0) == (weights is quantised)
        bank.begin(0, training=False)
        found.append(generate(Decoder(config, weights), bank, random_sequences([9, 12]), max_new_tokens=5, eos_ids=()))
    assert found[0] == found[1]


def test_the_compute_dtype_changes_no_value(model: TinyModel) -> None:
    dense, config = model.decoder.weights, model.config
    layers = [replace(layer, **{site: getattr(layer, site).double() for site in SITES}) for layer in dense.layers]
    wide = linear_weights(quantise_weights(replace(dense, layers=layers), config, "nf4"))
    for double, single in zip(wide, linear_weights(quantise_weights(dense, config, "nf4")), strict=True):
        assert double.dense().dtype == torch.float64 and torch.equal(double.dense(), single.dense().double())


@pytest.mark.parametrize("form", ["lora", "ia3", "bitfit", "ln-tuning", "svft"])
def test_merging_needs_dequantised_weights(model: TinyModel, form: str) -> None:
    config = model.config
    weights = quantise_weights(model.decoder.weights, config, "nf4")
    before = [tensor.clone() for tensor in weights.tensors()]
    bank = shake(new_bank(config, small_method(form), weights))
    bank.begin(0, training=False)
    pack = pack_of(bank, random_sequences([9, 12]))
    with torch.no_grad():
        expected = Decoder(config, weights).logits(pack, bank)
        with pytest.raises(UserError, match="cannot merge an adapter into weights in 4 bits; dequantise them"):
            merge_adapter(config, weights, model.family, bank, 0)
        dense = dequantise_weights(weights)
        merged = merge_adapter(config, dense, model.family, bank, 0)
        plain = new_bank(merged, LoRA(), dense)
        plain.begin(0, training=False)
        assert relative(Decoder(merged, dense).logits(pack, plain), expected) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, weights.tensors(), strict=True))


def test_what_cannot_be_done(model: TinyModel, tmp_path: Path) -> None:
    config, dense = model.config, model.decoder.weights
    weights = quantise_weights(dense, config, "nf4")
    with pytest.raises(UserError, match=r"'nf5'.*nf4"):
        quantise_weights(dense, config, "nf5")
    with pytest.raises(UserError, match=r"'nf5'.*nf4"):
        load_model(model.folder, quant="nf5")
    with pytest.raises(UserError, match="in 4 bits already"):
        quantise_weights(weights, config, "nf4")
    with pytest.raises(UserError, match="cannot train weights in 4 bits"):
        new_bank(config, small_method("full"), weights)
    with pytest.raises(UserError, match="cannot store weights in 4 bits"):
        save_model(tmp_path / "out", weights, config)
    assert not (tmp_path / "out").exists()
    odd = replace(config, hidden_size=40, head_dim=20, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UserError, match="q_proj has 20 x 40; load this model without quantisation"):
        quantise_weights(random_weights(odd), odd, "nf4")


def four_bit(hf: Any, kind: str) -> Any:
    """A copy of a transformers model with every projection as bitsandbytes' Linear4bit, quantised on the CPU."""
    import bitsandbytes

    found = copy.deepcopy(hf)
    for name, linear in list(found.named_modules()):
        if name.endswith("proj"):
            made = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None,
                compute_dtype=torch.float32, compress_statistics=QUANTISATIONS[kind], quant_type="nf4",
            )  # fmt: skip
            made.load_state_dict(linear.state_dict())
            parent, _, own = name.rpartition(".")
            setattr(found.get_submodule(parent), own, made.to("cpu"))
    assert {type(m).__name__ for n, m in found.named_modules() if n.endswith("proj")} == {"Linear4bit"}
    return found


def of_bitsandbytes(linear: Any) -> Nf4Weight:
    """A Linear4bit's own bytes."""
    state = linear.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = NestedAbsmax(
            codes=state.absmax, absmax=state.state2.absmax, offsets=state.offset[None], sizes=(state.absmax.numel(),)
        )
    return Nf4Weight(codes=linear.weight.data.flatten(), absmax=absmax, shape=tuple(state.shape), dtype=torch.float32)


def with_their_bytes(model: TinyModel, hf: Any) -> DecoderWeights:
    """Our weights with every module as bitsandbytes quantised it."""
    family = family_of(model.config)
    layers = []
    for i, layer in enumerate(model.decoder.weights.layers):
        taken = {
            site: stacked([of_bitsandbytes(hf.get_submodule(family.module_name(m, i))) for m in modules])
            for site, modules in SITES.items()
        }
        layers.append(replace(layer, **taken))
    return replace(model.decoder.weights, layers=layers)


def peft_lora(hf: Any, bank: AdapterBank, config: DecoderConfig) -> Any:
    """PEFT's LoRA around a model, with the values of the bank's only run."""
    import peft

    method = bank.method
    assert isinstance(method, LoRA)
    wrapped = peft.get_peft_model(
        hf,
        peft.LoraConfig(
            r=method.rank, lora_alpha=method.alpha, lora_dropout=0.0, target_modules=list(method.target_modules)
        ),
    )
    for name, parameter in peft_parameters(wrapped, config).items():
        parameter.data.copy_(bank.run_tensors(0)[name])
    return wrapped


def peft_parameters(wrapped: Any, config: DecoderConfig) -> Mapping[str, Any]:
    """PEFT's factors under the bank's names."""
    family = family_of(config)
    return {
        f"layers.{i}.{m}.{factor}": wrapped.get_parameter(
            f"base_model.model.{family.module_name(m, i)}.lora_{factor}.default.weight"
        )
        for i in range(config.num_hidden_layers)
        for m in MODULES
        for factor in "AB"
    }


@pytest.mark.parametrize(("variant", "kind"), [(variant, "nf4") for variant in VARIANTS] + [("qwen2", "nf4-double")])
def test_lora_equals_peft_with_bitsandbytes(
    variant: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.setitem(SHAPE, "intermediate_size", 128)  # its CPU library is wrong where a row is no whole blocks
    tiny = tiny_model(variant, tmp_path)
    hf = four_bit(tiny.hf, kind)
    ours = load_model(tiny.folder, quant=kind)[1] if kind == "nf4" else with_their_bytes(tiny, hf)
    decoder, config = Decoder(tiny.config, ours), tiny.config
    bank = shake(new_bank(config, EVERYWHERE, ours))
    wrapped = peft_lora(hf, bank, config).train()  # in eval mode bitsandbytes may compute in bf16, whatever was asked
    bank.begin(0, training=True)
    bank.zero_grad()
    for prompt in PROMPTS:
        pack = pack_of(bank, [Sequence(tokens=prompt, num_prompt=1)])
        found = decoder.logits(pack, bank)
        theirs = wrapped(torch.tensor([prompt])).logits[0]
        assert relative(found.detach(), theirs.detach()) <= 1e-5
        seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(len(prompt)))
        (found * seed).sum().backward()
        (theirs * seed).sum().backward()
    bank.finish()
    for name, parameter in peft_parameters(wrapped, config).items():
        assert relative(bank.parameters[name].grad[0], parameter.grad) <= 1e-5, name
