"""GGUF files give the weights, config and tokens of the model they were converted from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from peftdyno.engine.config import RopeScaling
from peftdyno.engine.errors import UserError
from peftdyno.engine.gguf_file import GGUFFile
from peftdyno.engine.gguf_tokenizer import tokenizer_files
from peftdyno.engine.sources import load_model, resolve_config
from peftdyno.engine.tokenizer import Tokenizer
from peftdyno.engine.weight_files import to_state_dict
from peftdyno.engine.weights import random_weights

from .tiny_gguf import TOKENS, tiny_config, write_gguf

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTDYNO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_same_model_as_was_written(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    weights = random_weights(config)
    path = write_gguf(tmp_path / "model.gguf", weights, config)
    found, loaded, tokenizer, files = load_model(path)
    assert found == config == resolve_config(path)
    for expected, tensor in zip(weights.tensors(), loaded.tensors(), strict=True):
        # Gemma's norm weights are stored with one added, which rounds them.
        torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-7 * (family == "gemma3_text"))
    assert tokenizer is not None
    assert tokenizer.eos_ids == (2,)
    assert files.source["sha256"] == files.checksums()["model.gguf"]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_same_weights_as_transformers_reads(family: str, kind: Kind, tmp_path: Path) -> None:
    import transformers

    # transformers reads Qwen 3 files as if every head had 128 columns.
    config = tiny_config(family, head_dim=128 if family == "qwen3" else 16)
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config, kind=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    reference = model.state_dict()
    for name, tensor in to_state_dict(load_model(path)[1], config).items():
        assert torch.equal(tensor, reference[name]), name


def test_llama3_frequencies_become_their_published_settings(tmp_path: Path) -> None:
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fields = {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    config = tiny_config("llama", rope_theta=500000.0, rope_scaling=fields)
    factors = reference_factors(config.head_dim, fields)
    path = write_gguf(tmp_path / "a.gguf", random_weights(config), config, extra_tensors={"rope_freqs.weight": factors})
    assert resolve_config(path).rope_scaling == RopeScaling(kind="llama3", factor=32.0)
    path = write_gguf(
        tmp_path / "b.gguf", random_weights(config), config, extra_tensors={"rope_freqs.weight": factors**2}
    )
    with pytest.raises(UserError, match=r"b\.gguf: tensor 'rope_freqs\.weight' does not follow"):
        resolve_config(path)


def reference_factors(head_dim: int, fields: dict[str, object]) -> np.ndarray:
    """What transformers divides each frequency by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_theta": 500000.0, **fields})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled).float().numpy()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(part: float, tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=r"model\.gguf: truncated or corrupt GGUF file"):
        load_model(path)


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.gguf: file not found"):
        load_model(tmp_path / "absent.gguf")
    config = tiny_config("llama")
    extra = {"blk.0.unknown.weight": np.zeros(4, dtype=np.float32)}
    path = write_gguf(tmp_path / "a.gguf", random_weights(config), config, extra_tensors=extra)
    with pytest.raises(UserError, match=r"a\.gguf: unexpected tensor 'blk\.0\.unknown\.weight'"):
        load_model(path)
    path = write_gguf(tmp_path / "b.gguf", random_weights(config), config, splitter="tekken")
    with pytest.raises(UserError, match=r"b\.gguf: field 'tokenizer\.ggml\.pre' is 'tekken'"):
        load_model(path)


@pytest.mark.parametrize("splitter", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_tokenizer_of_the_metadata(splitter: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config, splitter=splitter)
    tokenizer = load_model(path)[2]
    text = "hello world  12 <|im_end|>\n\ncafé 你好"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert TOKENS[ids[0]] == "hello"
    assert ids.count(2) == 1
    assert tokenizer.chat("hello") == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    spaces = [TOKENS[token] for token in tokenizer.encode("a  1")]
    # Where digits stand alone, the spaces before them are one word; elsewhere the last belongs to the number.
    assert spaces == (["a", "ĠĠ", "1"] if splitter == "smollm" else ["a", "Ġ", "Ġ", "1"])


def test_the_tokenizer_is_converted_once_and_mended(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_gguf(tmp_path / "model.gguf", random_weights(config), config)
    folder = load_model(path)[3].tokenizer_folder
    file = folder / "tokenizer.json"
    first = file.stat().st_mtime_ns
    load_model(path)
    assert file.stat().st_mtime_ns == first
    file.write_text("{}")
    load_model(path)
    assert file.read_bytes() == tokenizer_files(GGUFFile(path))["tokenizer.json"]
    assert Tokenizer.load(folder).vocab_size == len(TOKENS)
