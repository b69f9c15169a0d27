"""Families read transformers' configs, old and new, and refuse what they do not understand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftdyno.engine.builtin_configs import BUILTIN_CONFIGS, builtin_config
from peftdyno.engine.config import DecoderConfig, RopeScaling
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import config_from_hf, families, family_of
from peftdyno.engine.sources import resolve_config, resolve_model
from peftdyno.engine.weights import layer_parts, parameter_count

from .tiny_models import VARIANTS, tiny_config

PUBLISHED_SIZES = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-1b": 999_885_952,
    "smollm2-135m": 134_515_008,
}


def llama(**fields: object) -> dict[str, object]:
    return {**BUILTIN_CONFIGS[0].fields, **fields}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_transformers_writes(variant: str) -> None:
    reference = tiny_config(variant)
    config = config_from_hf(reference.to_dict())
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
        assert getattr(config, name) == getattr(reference, name)
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.head_dim == getattr(reference, "head_dim", 64 // 4)
    kinds = getattr(reference, "layer_types", None)
    if kinds is not None:
        for layer, kind in enumerate(kinds):
            expected = reference.sliding_window if kind == "sliding_attention" else None
            assert config.window(layer) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_transformers(variant: str, tmp_path: Path) -> None:
    import transformers

    config = config_from_hf(tiny_config(variant).to_dict())
    written = family_of(config).to_hf(config)
    assert config_from_hf(written) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config_from_hf(read.to_dict()) == config


@pytest.mark.parametrize("entry", BUILTIN_CONFIGS, ids=lambda entry: entry.short_names[0])
def test_builtin_shapes_agree_with_transformers(entry: object) -> None:
    import transformers

    fields = dict(entry.fields)
    reference = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config = config_from_hf(entry.fields)
    assert config_from_hf(reference.to_dict()) == config
    for name in (*entry.short_names, *entry.hub_ids):
        assert builtin_config(name.upper()) == config


@pytest.mark.parametrize(("name", "count"), PUBLISHED_SIZES.items())
def test_builtin_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert parameter_count(resolve_config(name)) == count


def test_peft_bench_shape_by_its_hub_id() -> None:
    config = resolve_config("meta-llama/Meta-Llama-3-8B-Instruct")
    assert (config.hidden_size, config.key_size, config.intermediate_size) == (4096, 1024, 14336)


def test_every_family_names_every_tensor_of_its_models() -> None:
    assert set(families()) == {"llama", "mistral", "qwen2", "qwen3", "gemma3"}
    for variant in VARIANTS:
        config = config_from_hf(tiny_config(variant).to_dict())
        family = family_of(config)
        parts = [part for parts in layer_parts(config).values() for part in parts]
        names = [family.tensor_name(part, 1) for part in parts]
        assert len(set(names)) == len(parts)
        assert all(".1." in name for name in names)


def test_old_and_new_rope_fields_mean_the_same() -> None:
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = config_from_hf(llama(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}))
    older = config_from_hf(llama(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}))
    fields = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    del fields["rope_theta"]
    assert old == older == config_from_hf(fields)
    assert old.rope_scaling == RopeScaling(kind="llama3", factor=32.0)


def test_gemma_inside_a_model_with_images() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "sliding_window": 9}
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106], "vision_config": {}}
    config = config_from_hf(outer)
    assert config.eos_token_ids == (1, 106)
    assert config.window_layers == (True,) * 5 + (False, True)
    assert config.embedding_scale == 8.0
    assert config.head_dim == 256


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": None}, "model_type"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_refuses_naming_the_field(change: dict[str, object], culprit: str) -> None:
    with pytest.raises(UserError, match=culprit):
        config_from_hf(llama(**change))


def test_refuses_unknown_attention_kinds() -> None:
    fields = {**resolve_hf("qwen2"), "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3}
    with pytest.raises(UserError, match="chunked_attention"):
        config_from_hf(fields)
    with pytest.raises(UserError, match="use_bidirectional_attention"):
        config_from_hf({**resolve_hf("gemma3"), "use_bidirectional_attention": True})


def resolve_hf(variant: str) -> dict[str, object]:
    return dict(tiny_config(variant).to_dict())


def test_checkpoints_without_a_place_for_a_bias_are_not_written() -> None:
    config = DecoderConfig(**{**vars(config_from_hf(llama())), "attention_bias": True})
    with pytest.raises(UserError, match="biases"):
        family_of(config).to_hf(config)


def test_unknown_model_lists_the_closest() -> None:
    for find in (resolve_config, resolve_model):
        with pytest.raises(UserError, match=r"unknown model 'lama-3-8b'; did you mean .*llama-3-8b"):
            find("lama-3-8b")


def test_end_tokens_of_the_generation_settings_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama(eos_token_id=128001)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    assert resolve_config(tmp_path).eos_token_ids == (128001, 128009)


def test_the_file_at_fault_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: file not found"):
        resolve_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a readable JSON file"):
        resolve_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llama(hidden_act="relu")))
    with pytest.raises(UserError, match=r"config\.json: field 'hidden_act'"):
        resolve_config(tmp_path)
