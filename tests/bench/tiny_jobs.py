"""A tiny model folder with a tokenizer, tiny data sets, and a command line run inside the test's process."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from peftdyno.bench.cli import run
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families import config_from_hf
from peftdyno.engine.weight_files import save_model
from peftdyno.engine.weights import random_weights

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
WORDS = ["a dull film", "a bright film", "negative", "positive", "Is the feeling of this movie review"] * 3
REVIEWS = [("dull", 0), ("bright", 1), ("grey", 0), ("lovely", 1)]


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": CHATML.encode(),
    }


def tiny_shape() -> DecoderConfig:
    """Two narrow Llama layers."""
    fields = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    return config_from_hf(fields)


def write_model(folder: Path, seed: int = 0) -> Path:
    """A model folder with random weights."""
    config = tiny_shape()
    save_model(folder, random_weights(config, torch.float32, seed), config, tokenizer_files())
    return folder


def write_sst2(folder: Path, train: int = 40, test: int = 10) -> Path:
    """A data folder whose sst2 has a few made-up reviews."""
    task = folder / "sst2"
    task.mkdir(parents=True)
    for split, count in (("train", train), ("validation", test)):
        rows = [{"sentence": f"a {REVIEWS[i % 4][0]} film {i}", "label": REVIEWS[i % 4][1]} for i in range(count)]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class Ran:
    """What a command line gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


@dataclass
class Shell:
    """Runs command lines in this process, with the model and the data of the test."""

    model: Path
    data: Path
    capture: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, *words: object) -> Ran:
        arguments = [str(word) for word in words]
        self.monkeypatch.setattr(sys, "argv", ["peftdyno", *arguments])
        self.capture.readouterr()
        status = run(arguments, "peftdyno")
        captured = self.capture.readouterr()
        return Ran(status, captured.out, captured.err)

    def fails(self, *words: object) -> str:
        """The one line that a command with a wrong input says."""
        ran = self(*words)
        assert ran.status == 2 and ran.out == "", ran
        lines = ran.err.splitlines()
        assert len(lines) == 1 and "Traceback" not in ran.err, ran.err
        return lines[0]

    def job(self, *more: object) -> tuple[object, ...]:
        """Options of a small job."""
        return ("--model", self.model, "--data", self.data, "--dtype", "fp32", "--steps", 4, "--batch", 2, *more)
