"""Weights reach their fused places whole, and every fault of a file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import config_from_hf
from peftdyno.engine.model_cache import publish_folder
from peftdyno.engine.sources import load_model
from peftdyno.engine.weight_files import save_model, to_state_dict
from peftdyno.engine.weights import empty_weights, parameter_count, random_weights

from .tiny_models import VARIANTS, tiny_config, tiny_hf_model

SMALL = DecoderConfig(
    family="llama",
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
)
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model folder that the faults below are put into."""
    save_model(tmp_path / "model", random_weights(SMALL), SMALL)
    return tmp_path / "model"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a folder."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_equals_transformers(variant: str, tmp_path: Path) -> None:
    model, folder = tiny_hf_model(variant, tmp_path)
    config, weights, tokenizer, files = load_model(folder)
    reference = model.state_dict()
    state = to_state_dict(weights, config)
    assert reference.keys() - state.keys() <= {"lm_head.weight"}
    assert not state.keys() - reference.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, reference[name]), name
    assert torch.equal(weights.head, reference["lm_head.weight"])
    assert (weights.head is weights.embed) == config.tie_word_embeddings
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    assert tokenizer is None
    assert files.source == {"kind": "folder", "path": str(folder)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_is_written(variant: str, tmp_path: Path) -> None:
    import transformers

    config = config_from_hf(tiny_config(variant).to_dict())
    weights = random_weights(config, seed=1)
    save_model(tmp_path / "written", weights, config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in to_state_dict(weights, config).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert load_model(tmp_path / "written")[0] == config


def test_fused_rows_are_in_order() -> None:
    weights = random_weights(SMALL)
    state = to_state_dict(weights, SMALL)
    layer = weights.layers[1]
    names = [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv"]
    assert torch.equal(layer.qkv, torch.cat([state[name] for name in names]))
    halves = [state[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(halves))


def test_sharded_folder(tmp_path: Path) -> None:
    model, single = tiny_hf_model("qwen3", tmp_path)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = load_model(single)[1], load_model(sharded)[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), parts.tensors(), strict=True))
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name}: missing, though model.safetensors.index.json"):
        load_model(sharded)


def test_dtype_and_device(folder: Path) -> None:
    weights = load_model(folder, dtype=torch.bfloat16)[1]
    assert {tensor.dtype for tensor in weights.tensors()} == {torch.bfloat16}
    single = load_model(folder)[1]
    assert torch.equal(weights.layers[0].down, single.layers[0].down.bfloat16())
    assert {tensor.device.type for tensor in empty_weights(SMALL).tensors()} == {"meta"}


def test_random_weights_follow_their_seed() -> None:
    first, again, other = random_weights(SMALL), random_weights(SMALL), random_weights(SMALL, seed=1)
    assert torch.equal(first.layers[1].o, again.layers[1].o)
    assert not torch.equal(first.layers[1].o, other.layers[1].o)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({K_PROJ: None}, rf"model\.safetensors: missing tensor '{K_PROJ}'"),
        ({"extra.weight": torch.zeros(2)}, r"unexpected tensor 'extra\.weight'"),
        ({K_PROJ: torch.zeros(4, 9)}, rf"'{K_PROJ}' has shape \[4, 9\], the config says \[4, 8\]"),
        ({K_PROJ: torch.zeros(4, 8, dtype=torch.int8)}, rf"'{K_PROJ}' is stored as I8, expected one of"),
    ],
)
def test_faulty_tensors_are_named(folder: Path, fault: dict[str, torch.Tensor | None], message: str) -> None:
    change(folder, **fault)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_many_faulty_tensors_are_counted(folder: Path) -> None:
    change(folder, **{f"model.layers.0.mlp.{p}_proj.weight": None for p in ("gate", "up", "down")})
    change(folder, **{"model.norm.weight": None})
    with pytest.raises(UserError, match=r"missing 4 tensors: 'model\.layers\.0.*, \.\.\.$"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or corrupt"):
        load_model(folder)


def test_no_weights_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors are read"):
        load_model(folder)


def test_old_rotary_buffers_are_no_weights(folder: Path) -> None:
    plain = load_model(folder)[1]
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})
    found = load_model(folder)[1]
    pairs = zip(found.tensors(), plain.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_stored_head_of_a_tied_model(tmp_path: Path) -> None:
    tied = DecoderConfig(**{**vars(SMALL), "tie_word_embeddings": True})
    weights = random_weights(tied)
    save_model(tmp_path / "model", weights, tied)
    change(tmp_path / "model", **{"lm_head.weight": weights.embed.clone()})
    load_model(tmp_path / "model")
    change(tmp_path / "model", **{"lm_head.weight": weights.embed + 1})
    with pytest.raises(UserError, match=r"'lm_head\.weight' differs from the embedding"):
        load_model(tmp_path / "model")


def test_gemma_with_images_is_read_as_text(tmp_path: Path) -> None:
    fields = tiny_config("gemma3").to_dict()
    config = config_from_hf(fields)
    weights = random_weights(config)
    for prefix in ("language_model.model.", "model.language_model."):
        folder = tmp_path / prefix
        folder.mkdir()
        state = {name.replace("model.", prefix, 1): t.clone() for name, t in to_state_dict(weights, config).items()}
        state["vision_tower.weight"] = torch.zeros(3)
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": fields}))
        found = load_model(folder)[1]
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), weights.tensors(), strict=True))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError), publish_folder(tmp_path / "model") as partial:
        (partial / "half").write_text("...")
        raise KeyError
    assert not list(tmp_path.iterdir())
    save_model(tmp_path / "model", random_weights(SMALL), SMALL)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already exists and is not empty"):
        save_model(tmp_path / "model", random_weights(SMALL, seed=1), SMALL)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
