"""Adapters go to PEFT and come back: equal logits and greedy generations on every family, and every fault named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.adapters.peft_format import load_adapter, save_adapter
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import family_of
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence
from peftdyno.engine.weights import random_weights

from .banks import TinyModel, pack_of, relative, shake, small_method, tiny_model
from .peft_adapters import PROMPTS, in_peft, loaded, logits_of, made_by_peft, peft_generation, peft_logits, saved

VARIANTS = ("llama", "mistral", "qwen2-window", "qwen3", "gemma3")
TOLERANCE = 1e-5
Models = Callable[[str], TinyModel]

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank_pattern": {"k_proj": 2, "layers.1.v_proj": 5}, "alpha_pattern": {"down_proj": 3.5}}),
    "lora in some layers": ("lora", {"layers_to_transform": (0, 2), "rank_stabilised": True, "init": "gaussian"}),
    "lora of single modules": ("lora", {"target_modules": ("layers.0.o_proj", "up_proj"), "lora_bias": True}),
    "dora with biases": ("lora", {"dora": True, "bias": "all", "target_modules": ("q_proj", "v_proj")}),
    "pissa": ("lora", {"init": "pissa", "rank_stabilised": True, "rank_pattern": {"v_proj": 3}}),
    "ia3": ("ia3", {}),
    "ia3 of outputs": ("ia3", {"feedforward": False, "target_modules": ("layers.1.down_proj", "q_proj")}),
    "ln-tuning": ("ln-tuning", {}),
    "ln-tuning of some": ("ln-tuning", {"target_modules": ("layers.1.mlp_norm", "input_norm")}),
    "bitfit": ("bitfit", {}),
    "bitfit in the mlp": ("bitfit", {"target_modules": ("layers.2.gate_proj", "down_proj")}),
}
"""Name -> (method, settings) that go out and come back as they are, but for the PiSSA start."""

THEIRS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1),
    "lora by regular expression": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=r".*\.[02]\.(self_attn|mlp)\.(k|down)_proj", use_rslora=True,
        rank_pattern={r"layers\.2\..*": 6, "0.mlp.down_proj": 3}, alpha_pattern={"^model.layers.0.mlp.down_proj": 5},
    ),
    "lora everywhere": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=["gate_proj"], init_lora_weights=False,
    ),
    "lora in one layer": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=1,
        layers_pattern="layers", init_lora_weights="gaussian",
    ),
    "lora with biases": lambda: peft.LoraConfig(task_type="CAUSAL_LM", bias="all", target_modules=["k_proj", "o_proj"]),
    "lora with a bias on B": lambda: peft.LoraConfig(task_type="CAUSAL_LM", lora_bias=True, lora_alpha=3),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, init_lora_weights=False),
    "pissa": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", r=3, lora_alpha=5),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "ia3 whose feed-forward matches nothing": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules="(.*k_proj)|(.*down_proj)", feedforward_modules="down_proj"
    ),
    "ln-tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "ln-tuning of some": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Each variant, made once."""
    return cache(lambda variant: tiny_model(variant, tmp_path_factory.mktemp(variant)))


@pytest.fixture(scope="module")
def llama(models: Models) -> TinyModel:
    return models("llama")


def ours(model: TinyModel, name: str) -> AdapterBank:
    """A bank moved from its start."""
    method, more = OURS[name]
    small = {"rank": 4, "alpha": 6.0, "dropout": 0.0} if method == "lora" else {}
    return shake(model.bank(METHODS[method](**small, **more)))


def check_equal(model: TinyModel, bank: AdapterBank, theirs: Any) -> None:
    """Logits within rounding, away from the base's, and the same greedy tokens."""
    found, expected = logits_of(model, bank), peft_logits(theirs)
    assert relative(found, expected) <= TOLERANCE
    assert relative(expected, peft_logits(model.hf)) > 1e-3
    prompts = [Sequence(tokens=prompt, num_prompt=len(prompt), ordinal=i) for i, prompt in enumerate(PROMPTS)]
    tokens = generate(model.decoder, bank, prompts, max_new_tokens=8, eos_ids=())
    assert tokens == [peft_generation(theirs, prompt, 8) for prompt in PROMPTS]


EVERYWHERE = ("lora", "dora with biases", "ia3", "ln-tuning", "bitfit", "lora everywhere")
"""What is tried on every family; the rest on one that has most of what others lack."""


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """(family's variant, name) of the exchanges that are tried."""
    return [(v, name) for v in VARIANTS for name in names if name in EVERYWHERE or v == "gemma3"]


@pytest.mark.parametrize(("variant", "name"), pairs(OURS))
def test_made_here_loads_in_peft_and_back(variant: str, name: str, models: Models, tmp_path: Path) -> None:
    model = models(variant)
    bank = ours(model, name)
    folder = saved(model, bank, tmp_path / "adapter")
    check_equal(model, bank, in_peft(model, folder))
    back = loaded(model, folder)
    if name == "pissa":
        assert relative(logits_of(model, back), logits_of(model, bank)) <= TOLERANCE
    else:
        assert back.method == bank.method
        assert torch.equal(back.flat, bank.flat)


@pytest.mark.parametrize(("variant", "name"), pairs(THEIRS))
def test_made_by_peft_loads_here(variant: str, name: str, models: Models, tmp_path: Path) -> None:
    model = models(variant)
    theirs = made_by_peft(model, THEIRS[name](), tmp_path)
    check_equal(model, loaded(model, tmp_path), theirs)


def test_lora_only_biases_are_read_as_peft_reads_its_own(tmp_path: Path) -> None:
    """PEFT trains them, does not store them, and so reads the base's."""
    model = tiny_model("llama-bias", tmp_path / "model")
    made_by_peft(model, peft.LoraConfig(task_type="CAUSAL_LM", bias="lora_only"), tmp_path / "adapter")
    check_equal(model, loaded(model, tmp_path / "adapter"), in_peft(model, tmp_path / "adapter"))


def test_several_adapters_are_served_together(llama: TinyModel, tmp_path: Path) -> None:
    """Of other ranks, targets, starts and dropouts, in one pack."""
    forms: list[dict[str, Any]] = [
        {"rank": 2, "dropout": 0.3},
        {"rank": 5, "target_modules": ("q_proj", "k_proj"), "init": "random"},
        {"rank": 3, "layers_to_transform": (1,), "alpha": 2.0},
    ]
    banks = [shake(llama.bank(LoRA(**form), (seed,))) for seed, form in enumerate(forms)]
    together = loaded(llama, *(saved(llama, bank, tmp_path / str(i)) for i, bank in enumerate(banks)))
    together.begin(0, training=False)
    pack = pack_of(together, [Sequence(tokens=PROMPTS[0], num_prompt=1, run=run) for run in range(3)])
    with torch.no_grad():
        found = llama.decoder.logits(pack, together).split(len(PROMPTS[0]))
    for logits, bank in zip(found, banks, strict=True):
        assert relative(logits, logits_of(llama, bank)) <= TOLERANCE


def test_adapters_that_cannot_share_a_bank_are_refused(llama: TinyModel, tmp_path: Path) -> None:
    folders = [saved(llama, ours(llama, name), tmp_path / name) for name in ("lora", "ia3", "dora with biases")]
    with pytest.raises(UserError, match=r"ia3: method 'ia3' cannot share a bank with 'lora'"):
        loaded(llama, *folders[:2])
    with pytest.raises(UserError, match=r"differ in lora\.\w+"):
        loaded(llama, folders[0], folders[2])


def test_files_are_those_of_peft(llama: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for _ in range(2):  # the second takes the first one's place
        save_adapter(ours(llama, "lora"), 0, folder, 'org/base: "x"', llama.family, "## Costs\n12 MB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["base_model_name_or_path"] == 'org/base: "x"'
    assert set(config) <= set(peft.LoraConfig().to_dict())
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    import yaml

    assert yaml.safe_load(header)["base_model"] == 'org/base: "x"'
    assert "12 MB" in body and "trained values" in body


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full"}))
def test_every_method_keeps_its_tensors(name: str, llama: TinyModel, tmp_path: Path) -> None:
    """Whatever acts at inference; an encoder is not stored."""
    bank = shake(llama.bank(small_method(name)))
    folder = saved(llama, bank, tmp_path / "adapter")
    assert relative(logits_of(llama, loaded(llama, folder)), logits_of(llama, bank)) <= TOLERANCE


@pytest.fixture(scope="module")
def sound(llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama, ours(llama, "lora"), tmp_path_factory.mktemp("sound") / "adapter")


A_NAME = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task_type", None, r"field 'task_type' must be 'CAUSAL_LM'"),
        ("peft_type", "LOHA", r"unknown peft_type 'LOHA'; did you mean LORA"),
        ("frobnicate", 3, r"field 'frobnicate' \(3\) is unknown"),
        ("use_qalora", True, r"field 'use_qalora' is True, which is not supported; expected False"),
        ("modules_to_save", ["lm_head"], r"field 'modules_to_save' is \['lm_head'\]"),
        ("layer_replication", [[0, 2], [1, 3]], r"field 'layer_replication'"),
        ("megatron_config", {"a": 1}, r"field 'megatron_config'"),
        ("trainable_token_indices", [1], r"field 'trainable_token_indices'"),
        ("init_lora_weights", "olora", r"field 'init_lora_weights' is 'olora', expected true, false"),
        ("init_lora_weights", "pissa_niter_4", r"field 'init_lora_weights' is 'pissa_niter_4'"),
        ("init_lora_weights", 1, r"field 'init_lora_weights' is 1"),
        ("target_modules", ["lm_head"], r"'target_modules' is \['lm_head'\], expected modules other than lm_head"),
        ("target_modules", ["wq"], r"field 'target_modules' is \['wq'\], expected at least one module of a llama"),
        ("target_modules", "(", r"field 'target_modules' is '\(', expected a regular expression"),
        ("target_modules", None, r"field 'target_modules' is None"),
        ("layers_to_transform", [7], r"field 'target_modules'"),
        ("layers_pattern", "h", r"field 'layers_pattern' is 'h'"),
        ("r", 0, r"field 'r' is 0, expected a positive integer"),
        ("r", "8", r"field 'r' is '8', expected a positive integer"),
        ("lora_alpha", None, r"field 'lora_alpha' is None, expected a number"),
        ("lora_dropout", 1.5, r"adapter_config\.json: lora\.dropout 1\.5"),
        ("bias", "most", r"adapter_config\.json: lora\.bias 'most'"),
        ("rank_pattern", {"k_proj": 0}, r"field 'rank_pattern'.* positive number for 'k_proj'"),
        ("rank_pattern", {"(": 2}, r"field 'rank_pattern'.* regular expressions"),
        ("use_dora", "yes", r"field 'use_dora' is 'yes', expected true or false"),
        ("r", 7, r"tensor '.*' has shape \[4, 64\], expected \[7, 64\]"),
        ("use_dora", True, r"tensor '.*lora_magnitude_vector' \[\d+\] is missing"),
        ("layers_to_transform", [0], r"\d+ tensors that the config does not account for, the first is '.*layers\.1"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(
    field: str, value: Any, message: str, llama: TinyModel, sound: Path, tmp_path: Path
) -> None:
    config = json.loads((sound / "adapter_config.json").read_text())
    refused(llama, tmp_path, {**config, field: value}, load_file(sound / "adapter_model.safetensors"), message)


def changed(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    tensors[A_NAME][1, 3] = value
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != A_NAME}, rf"tensor '{A_NAME}' \[2, 64\] is missing"),
        (lambda t: t | {"base_model.model.x": torch.ones(2)}, r"1 tensors that .* the first is 'base_model\.model\.x'"),
        (lambda t: {n.removeprefix("base_model."): v for n, v in t.items()}, r"tensor 'base_model.* is missing"),
        (lambda t: t | {A_NAME: t[A_NAME].t().contiguous()}, rf"'{A_NAME}' has shape \[64, 2\], expected \[2, 64\]"),
        (lambda t: changed(t, float("nan")), rf"tensor '{A_NAME}' has NaN or infinite values"),
        (lambda t: changed(t, float("-inf")), rf"tensor '{A_NAME}' has NaN or infinite values"),
        (lambda t: t | {A_NAME: torch.ones(2, 64, dtype=torch.int32)}, rf"tensor '{A_NAME}' is torch\.int32"),
    ],
)
def test_bad_tensors_are_named(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    message: str,
    llama: TinyModel,
    sound: Path,
    tmp_path: Path,
) -> None:
    config = json.loads((sound / "adapter_config.json").read_text())
    refused(llama, tmp_path, config, change(load_file(sound / "adapter_model.safetensors")), message)


def refused(
    model: TinyModel, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    """Loading fails with one line that names a file of the folder."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder, model.config, model.family)
    text = str(caught.value)
    assert text.startswith(str(folder)) and "\n" not in text


def test_bad_files_are_named(llama: TinyModel, sound: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        load_adapter(tmp_path, llama.config, llama.family)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable JSON file"):
        load_adapter(tmp_path, llama.config, llama.family)
    (tmp_path / "adapter_config.json").write_text((sound / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file; only safetensors"):
        load_adapter(tmp_path, llama.config, llama.family)
    whole = (sound / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="truncated or corrupt safetensors"):
        load_adapter(tmp_path, llama.config, llama.family)


def test_auto_mapping_is_ignored(llama: TinyModel, sound: Path, tmp_path: Path) -> None:
    config = json.loads((sound / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "X", "parent_library": "no.such.module"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((sound / "adapter_model.safetensors").read_bytes())
    assert load_adapter(tmp_path, llama.config, llama.family)[0].name == "lora"


def test_the_text_part_of_a_model_that_reads_images_is_the_same(models: Models, tmp_path: Path) -> None:
    """Its adapters put `language_model` into every name."""
    model = models("gemma3")
    bank = ours(model, "lora")
    folder = saved(model, bank, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace("model.layers", "model.language_model.layers"): t for name, t in load_file(path).items()}
    assert all("language_model" in name for name in tensors)
    save_file(tensors, path)
    assert torch.equal(loaded(model, folder).flat, bank.flat)


@st.composite
def loras(draw: st.DrawFn) -> LoRA:
    """Any targets, patterns and options for a model of three layers."""
    kinds = draw(st.lists(st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj"]), min_size=1, unique=True))
    single = draw(st.lists(st.sampled_from(["layers.0.v_proj", "layers.2.v_proj", "layers.1.down_proj"]), unique=True))
    names = st.sampled_from([*kinds, *single, *(f"layers.1.{kind}" for kind in kinds)])
    return LoRA(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([1.0, 2.5])),
        target_modules=tuple(kinds + single),
        rank_pattern=draw(st.dictionaries(names, st.integers(1, 6), max_size=3)),
        alpha_pattern=draw(st.dictionaries(names, st.sampled_from([0.5, 3.0]), max_size=3)),
        rank_stabilised=draw(st.booleans()),
        dora=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
    )


RANDOM = DecoderConfig(
    family="llama", vocab_size=19, hidden_size=8, intermediate_size=6, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, attention_bias=True, attention_output_bias=True,
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(method=loras())
def test_any_lora_comes_back_as_it_was(method: LoRA, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same shapes, scalings and values, whatever way the settings are written."""
    folder, family = tmp_path_factory.mktemp("random") / "adapter", family_of(RANDOM)
    bank = shake(AdapterBank.create(RANDOM, [method], [0], random_weights(RANDOM)))
    save_adapter(bank, 0, folder, "random", family)
    back, tensors = load_adapter(folder, RANDOM, family)
    assert isinstance(back, LoRA)
    assert {p: back.scaling_of(p) for p in back.places(RANDOM)} == {
        p: method.scaling_of(p) for p in method.places(RANDOM)
    }
    values = bank.run_tensors(0)
    assert values.keys() == tensors.keys()
    assert all(torch.equal(values[name], tensors[name]) for name in values)


def test_the_model_is_left_as_it_was(llama: TinyModel) -> None:
    """The comparisons above worked on copies."""
    assert relative(logits_of(llama, llama.bank(METHODS["ia3"]())), peft_logits(copy.deepcopy(llama.hf))) <= TOLERANCE
