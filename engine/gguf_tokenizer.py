"""The tokenizer that a GGUF file carries in its metadata, as the files of a model folder.

Byte-level BPE vocabularies are rebuilt here, because the file names its way of splitting words only
by a keyword (`tokenizer.ggml.pre`), and a wrong split gives other tokens than the model was trained
on. SentencePiece vocabularies are converted by transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from peftdyno.engine.errors import UserError
from peftdyno.engine.gguf_file import GGUFFile
from peftdyno.engine.model_cache import (
    cache_folder,
    locked,
    publish_folder,
    verified_manifest,
    write_manifest,
)

CONTROL, USER_DEFINED = 3, 4
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer_folder(gguf: GGUFFile, digest: str) -> Path:
    """Folder in the cache with the tokenizer of a file of the given SHA-256, written on first use."""
    folder = cache_folder() / "tokenizers" / digest[:32]
    with locked(folder):
        if verified_manifest(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            with publish_folder(folder) as partial:
                for name, content in tokenizer_files(gguf).items():
                    (partial / name).write_bytes(content)
                write_manifest(partial, {"kind": "gguf", "sha256": digest})
    return folder


def tokenizer_files(gguf: GGUFFile) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and the chat template, by file name."""
    kind = gguf.value("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = byte_level_bpe(gguf).to_str()
    elif kind == "llama":
        backend = _sentencepiece(gguf)
    else:
        raise UserError(f"{gguf.path}: field 'tokenizer.ggml.model' is {kind!r}, supported: gpt2, llama")
    tokens = gguf.value("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.config().max_position_embeddings,
    }
    for name, key in SPECIAL_IDS.items():
        token_id = gguf.value(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            settings[name] = tokens[token_id]
    files = {"tokenizer.json": backend, "tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    template = gguf.value("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = template
    return {name: text.encode("utf-8") for name, text in files.items()}


def byte_level_bpe(gguf: GGUFFile) -> Tokenizer:
    """A byte-level BPE tokenizer as the published tokenizer.json of the same model has it."""
    tokens = gguf.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf.value("tokenizer.ggml.merges", [])]
    splitter = gguf.value("tokenizer.ggml.pre")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=splitter == "llama-bpe",
        )
    )
    backend.pre_tokenizer = word_splitter(gguf, splitter)
    backend.decoder = decoders.ByteLevel()
    if splitter == "qwen2":
        backend.normalizer = normalizers.NFC()
    _mark_added_tokens(backend, tokens, gguf.value("tokenizer.ggml.token_type", []))
    if gguf.value("tokenizer.ggml.add_bos_token", splitter == "llama-bpe"):
        bos = gguf.value("tokenizer.ggml.bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return backend


def word_splitter(gguf: GGUFFile, splitter: str) -> Any:
    """How text is cut before merging, by the keyword of the file."""
    if splitter == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if splitter == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {"llama-bpe": LLAMA3_WORDS, "qwen2": QWEN2_WORDS}.get(splitter)
    if words is None:
        raise UserError(
            f"{gguf.path}: field 'tokenizer.ggml.pre' is {splitter!r}, supported: gpt-2, llama-bpe, qwen2, smollm"
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _mark_added_tokens(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that are matched in text as they stand, before any splitting; control ones are special."""
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


def _sentencepiece(gguf: GGUFFile) -> str:
    """tokenizer.json of a SentencePiece vocabulary, by transformers' converter."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{gguf.path}: its tokenizer is converted by transformers: pip install 'peftdyno[hf]'"
        ) from error
    loaded = AutoTokenizer.from_pretrained(str(gguf.path.parent), gguf_file=gguf.path.name)
    text: str = loaded.backend_tokenizer.to_str()
    return text
