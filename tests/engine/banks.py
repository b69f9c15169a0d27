"""Small models, banks and batches that the tests of methods share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.families import Family, family_of_hf
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.engine.sources import load_model
from peftdyno.kernels import dispatch
from peftdyno.kernels.adamw import ADAMW
from peftdyno.kernels.library import PRIMITIVES
from peftdyno.kernels.oracle import Float64

from .tiny_models import VOCABULARY, tiny_hf_model

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "dropout": 0.1},
    "prompt-tuning": {"num_virtual_tokens": 5},
    "prefix-tuning": {"num_virtual_tokens": 4, "hidden_size": 16},
    "p-tuning": {"num_virtual_tokens": 4, "hidden_size": 16},
    "adapter": {"reduction": 8},
}
"""Settings that suit a tiny model, where the method's own do not."""

FORMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | {
    "prefix-tuning plain": ("prefix-tuning", {"projection": False}),
    "p-tuning mlp": ("p-tuning", {"encoder": "mlp"}),
    "adapter parallel": ("adapter", {"mode": "parallel", "activation": "silu", "scaling": 0.5}),
    "svft everywhere": (
        "svft",
        {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    ),
}
"""Every method, and the options that take another path: name -> (method, settings)."""


def small_method(form: str) -> Method:
    """A method of `FORMS` in a size for tiny models."""
    name, settings = FORMS[form]
    return METHODS[name](**(SMALL.get(name, {}) | settings))


@dataclass
class TinyModel:
    """A transformers model and the same weights in our decoder."""

    hf: Any
    folder: Path
    family: Family
    decoder: Decoder

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def bank(self, methods: Method | SequenceOf[Method], seeds: SequenceOf[int] = (0,)) -> AdapterBank:
        """A bank at its start; one method is repeated for every seed."""
        repeated = [methods] * len(seeds) if isinstance(methods, Method) else methods
        return AdapterBank.create(self.config, repeated, seeds, self.decoder.weights)


def tiny_model(variant: str, folder: Path, seed: int = 0) -> TinyModel:
    """A variant of `tiny_models`, read back from its folder."""
    hf, path = tiny_hf_model(variant, folder, seed)
    config, weights, _, _ = load_model(path)
    family = family_of_hf(json.loads((path / "config.json").read_text()))
    return TinyModel(hf, path, family, Decoder(config, weights))


def shake(bank: AdapterBank, scale: float = 0.1, seed: int = 7) -> AdapterBank:
    """Move every master of every run away from its start, each run by its own noise from its seed."""
    with torch.no_grad():
        for run, run_seed in enumerate(bank.seeds):
            generator = torch.Generator().manual_seed(1000 * seed + run_seed)
            for tensor in bank.run_tensors(run).values():
                tensor += scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return bank


def random_sequences(
    lengths: SequenceOf[int], *, run: int = 0, seed: int = 0, common: int = 3, vocabulary: int = VOCABULARY
) -> list[Sequence]:
    """Sequences of random tokens whose first `common` are the same; the second half of each are labels."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, vocabulary, (common,), generator=generator).tolist()
    sequences = []
    for i, length in enumerate(lengths):
        own = torch.randint(3, vocabulary, (max(length - common, 0),), generator=generator).tolist()
        tokens = tuple((first + own)[:length])
        sequences.append(Sequence(tokens=tokens, num_prompt=max(length // 2, 1), run=run, ordinal=i))
    return sequences


def pack_of(
    bank: AdapterBank, sequences: SequenceOf[Sequence], *, share_prefix: bool = False, losses_only: bool = False
) -> Pack:
    """The bank's pack of sequences, root included."""
    return build_pack(
        sequences, num_runs=bank.num_runs, share_prefix=share_prefix, root=bank.root, losses_only=losses_only
    )


def own_rows(pack: Pack, i: int) -> list[int]:
    """Rows of sequence i's tokens in order, those of a shared prefix among them, virtual tokens left out."""
    rows: list[int] = []
    index = pack.leaves[i]
    while index >= 0:
        segment = pack.segments[index]
        if segment.parent >= 0 or not pack.virtual_rows.numel():
            rows = [*range(segment.start, segment.start + segment.length), *rows]
        index = segment.parent
    return rows


def backward(
    decoder: Decoder, bank: AdapterBank, packs: SequenceOf[Pack], step: int = 0, training: bool = True
) -> list[float]:
    """Gradients of the packs' summed losses into the bank; the losses by run."""
    bank.zero_grad()
    bank.begin(step, training=training)
    totals = [0.0] * bank.num_runs
    for pack in packs:
        losses = decoder.losses(pack, bank) * pack.labels.weight
        losses.sum().backward()
        offsets = pack.labels.run_offsets
        for j in range(bank.num_runs):
            totals[j] += losses[offsets[j] : offsets[j + 1]].sum().item()
    bank.finish()
    return totals


def train_steps(
    decoder: Decoder,
    bank: AdapterBank,
    batches: SequenceOf[SequenceOf[SequenceOf[Sequence]]],
    rates: SequenceOf[float],
) -> list[list[float]]:
    """AdamW over the steps' micro-batches (lists of sequences); the losses of each step by run."""
    moments = [torch.zeros_like(bank.flat) for _ in range(2)]
    losses = []
    for step, micro_batches in enumerate(batches):
        losses.append(backward(decoder, bank, [pack_of(bank, m) for m in micro_batches if m], step))
        runs = bank.num_runs
        with torch.no_grad():
            ADAMW(
                bank.flat, bank.gradient, *moments, list(rates), [1.0] * runs, [step + 1] * runs,
                0.9, 0.999, 1e-8, 1e-2,
            )  # fmt: skip
    return losses


@contextmanager
def float64_kernels() -> Iterator[None]:
    """Every operator runs as its definition, in float64 throughout."""

    def wide(reference: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Float64():
                return reference(*args)

        return run

    before, references = dispatch.current(), {}
    for name, primitive in PRIMITIVES.items():
        references[name] = primitive.implementations["reference"]
        primitive.implementations["reference"] = wide(references[name])
    dispatch.use("reference")
    try:
        yield
    finally:
        dispatch.use(before)
        for name, reference in references.items():
            PRIMITIVES[name].implementations["reference"] = reference


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (norm or 1.0)
