"""Small random decoders, banks of every method and packs, for tests of the accounting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.activations import POLICIES
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.engine.weights import random_weights

FEW: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"num_virtual_tokens": 5},
    "prefix-tuning": {"num_virtual_tokens": 3, "hidden_size": 7},
    "p-tuning": {"num_virtual_tokens": 4, "hidden_size": 6},
}
"""Fields that make a method's default small."""
MORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"dora": True, "rank": 3}),
    ("lora", {"init": "pissa", "rank": 2}),
    ("lora", {"lora_bias": True, "bias": "all", "dropout": 0.0}),
    ("lora", {"target_modules": ("q_proj", "o_proj", "gate_proj"), "layers_to_transform": (1,)}),
    ("p-tuning", {"encoder": "mlp"}),
    ("prefix-tuning", {"projection": False}),
    ("ia3", {"feedforward": False}),
    ("adapter", {"mode": "parallel"}),
    ("adapter", {"places": ("mlp",), "activation": "silu"}),
    ("svft", {"target_modules": ("q_proj", "gate_proj")}),
    ("bitfit", {"target_modules": ("down_proj",)}),
)
"""Further settings of methods, which cost otherwise than their defaults."""


def variants() -> list[Method]:
    """Every registered method at its default, and more of those that have options."""
    found = [METHODS[name](**FEW.get(name, {})) for name in METHODS]
    return found + [METHODS[name](**{**FEW.get(name, {}), **fields}) for name, fields in MORE]


VARIANTS = variants()


def label(method: Method) -> str:
    """Name of a variant for a test's id."""
    changed = [f"{k}={v}" for k, v in vars(method).items() if v != getattr(METHODS[method.name](), k)]
    return "-".join([method.name, *changed]).replace(" ", "")


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Decoders of every flag, of a few narrow layers."""
    kv = draw(st.sampled_from([1, 2]))
    window = draw(st.sampled_from([None, 4]))
    layers = draw(st.integers(2, 3))
    return DecoderConfig(
        family="llama",
        vocab_size=draw(st.integers(11, 40)),
        hidden_size=draw(st.sampled_from([16, 24])),
        intermediate_size=draw(st.sampled_from([20, 36])),
        num_hidden_layers=layers,
        num_attention_heads=kv * draw(st.sampled_from([1, 3])),
        num_key_value_heads=kv,
        head_dim=draw(st.sampled_from([4, 8])),
        tie_word_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        attention_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        query_key_norm=draw(st.booleans()),
        post_norms=draw(st.booleans()),
        embedding_scale=draw(st.sampled_from([1.0, 4.0])),
        norm_offset=draw(st.sampled_from([0.0, 1.0])),
        sliding_window=window,
        window_layers=tuple(i % 2 == 0 for i in range(layers)) if window and draw(st.booleans()) else (),
        attention_softcap=draw(st.sampled_from([None, 2.0])),
        logit_softcap=draw(st.sampled_from([None, 3.0])),
    )


@st.composite
def sequences(draw: st.DrawFn, num_runs: int) -> list[Sequence]:
    """One to three sequences a run that begin alike, with at least one label."""
    found = []
    for run in range(num_runs):
        for ordinal in range(draw(st.integers(1, 3))):
            length = draw(st.integers(4, 9))
            num_prompt = draw(st.integers(1, length - 1))
            tokens = (1, 2, 3, *range(3, length))
            found.append(Sequence(tokens=tokens, num_prompt=num_prompt, run=run, ordinal=ordinal))
    return found


def real_model(job: Job, seed: int = 0) -> tuple[Decoder, AdapterBank]:
    """Decoder and bank of random values for a job, on the CPU."""
    weights = random_weights(job.config, job.dtype, seed)
    runs = range(len(job.methods))
    decoder = Decoder(job.config, weights, activations=job.activations)
    return decoder, AdapterBank.create(job.config, job.methods, runs, weights)


def under_every_policy(job: Job) -> list[Job]:
    """The job with each choice of what is kept for the backward pass."""
    return [replace(job, activations=policy) for policy in POLICIES]


def pack_of(job: Job, found: list[Sequence], *, share_prefix: bool) -> Pack:
    """A pack of some sequences for a job."""
    return build_pack(found, num_runs=len(job.methods), share_prefix=share_prefix, root=job.root)


DTYPES = (torch.float32, torch.bfloat16)
QUICK = settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
EACH = pytest.mark.parametrize("method", VARIANTS, ids=label)


@st.composite
def jobs(draw: st.DrawFn, method: Method) -> Job:
    runs = draw(st.integers(1, 2))
    return Job(config=draw(configs()), methods=(method,) * runs, dtype=draw(st.sampled_from(DTYPES)))
