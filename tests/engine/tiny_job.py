"""A small training job on a random decoder, for tests of the loop; as a program it trains into a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.batching import Example
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import OptimConfig
from peftdyno.engine.train import RunData, TrainConfig, TrainState, train
from peftdyno.engine.weights import random_weights

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def tiny_decoder() -> Decoder:
    """Two layers of random fp32 weights."""
    return Decoder(CONFIG, random_weights(CONFIG, torch.float32, seed=7))


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows that begin alike and end in a rule: the label is the token after the third."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        body = [int(t) for t in random.integers(5, 90, random.integers(3, 9))]
        rows.append(Example(tokens=(1, 2, 3, *body, (body[2] + 1) % 97, 4), num_prompt=3 + len(body)))
    return rows


def job(steps: int = 12, batch: int = 4, seed: int = 0, rate: float = 5e-3) -> RunData:
    """Data, rate and schedule of one run."""
    optim = OptimConfig(learning_rate=rate)
    return RunData(train=examples(30, seed), validation=examples(6, seed + 100), optim=optim, steps=steps, batch=batch)


def tiny_bank(decoder: Decoder, seeds: tuple[int, ...] = (0,), **options) -> AdapterBank:
    """LoRA of rank 3 with dropout, a run a seed."""
    method = replace(LoRA(rank=3, alpha=6.0, dropout=0.1), **options)
    return AdapterBank.create(decoder.config, [method] * len(seeds), seeds, decoder.weights)


def run_job(folder: Path, **options) -> TrainState:
    """Train the standard job into a folder, resuming what lies there."""
    decoder = tiny_decoder()
    config = TrainConfig(evaluate_every=0.25, save_every=0.1, **options)
    return train(decoder, tiny_bank(decoder), [job(steps=40)], config, folder, fingerprint="tiny")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_job(Path(sys.argv[1]))
