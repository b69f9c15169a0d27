"""Prediction: what a training step or a generation costs, from config, method and pack shapes alone.

The program itself runs on tensors without storage; `closed_form` sums the matrix products a second way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.symbolic import SymbolicCounter
from peftdyno.engine.accounting.tally import Tally
from peftdyno.engine.activations import Policy
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.border import fit_borders, lay_borders
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.generate import generate
from peftdyno.engine.optim import AdamW, OptimConfig, clip_factors, gradient_norms
from peftdyno.engine.pack import Pack, Root, build_pack
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.quant import quantise_weights
from peftdyno.engine.replayed_steps import ReplayedSteps
from peftdyno.engine.train import forward_backward
from peftdyno.engine.weights import empty_weights


@dataclass(frozen=True, kw_only=True)
class Untuned(Method):
    """The base model with nothing trained, in a method's place."""

    name: ClassVar[str] = "base"

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is predicted: a model, the method of each run, the compute dtype, the type of device, the kind of 4-bit
    weights where the base has them, what is kept for the backward pass, and whether weights have borders: None as in a
    training on that device."""

    config: DecoderConfig
    methods: tuple[Method, ...] = (Untuned(),)
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    quant: str | None = None
    activations: Policy = "keep"
    bordered: bool | None = None

    @property
    def root(self) -> Root | None:
        """Learned positions in front of every sequence."""
        return self.methods[0].root()

    def model(self, scope: Scope) -> tuple[Decoder, AdapterBank]:
        """Decoder and bank of shapes without values."""
        weights = empty_weights(self.config, self.dtype)
        if self.quant is not None:
            weights = quantise_weights(weights, self.config, self.quant)
        bank = AdapterBank.create(self.config, self.methods, range(len(self.methods)), weights)
        if self.bordered is None:
            fit_borders(weights, bank, torch.device(self.device))
        elif self.bordered:
            lay_borders(weights, bank)
        return Decoder(self.config, weights, scope, self.activations), bank

    def plain_pack(self, batch: int, length: int, *, num_prompt: int = 1) -> Pack:
        """`batch` sequences of `length` tokens for every run, without a shared prefix."""
        sequences = [
            PackSequence(tokens=(0,) * length, num_prompt=num_prompt, run=run, ordinal=i)
            for run in range(len(self.methods))
            for i in range(batch)
        ]
        return build_pack(sequences, num_runs=len(self.methods), root=self.root)


def training_step(job: Job, packs: Sequence[Pack]) -> Tally:
    """Costs of one step over the packs: forward, backward and optimizer."""
    scope = Scope()
    decoder, bank = job.model(scope)
    counter = SymbolicCounter(scope, job.device)
    run_step(decoder, bank, AdamW.create(bank), packs, Ledger(scope, counter=counter))
    return counter.tally


def run_step(
    decoder: Decoder,
    bank: AdapterBank,
    optimizer: AdamW,
    packs: Sequence[Pack],
    ledger: Ledger,
    step: int = 0,
    graphs: ReplayedSteps | None = None,
) -> None:
    """One training step in which every run takes part, at rate 0 and charged to the ledger."""
    configs = [OptimConfig(learning_rate=0.0)] * bank.num_runs
    forward_backward(decoder, bank, packs, step, ledger, graphs)
    with ledger.phase("optimizer", owner="adapter", layer=-1):
        clips = clip_factors(gradient_norms(bank), configs)
        optimizer.step(bank, configs, [0.0] * bank.num_runs, clips, [True] * bank.num_runs)


def forward_pass(job: Job, pack: Pack) -> Tally:
    """Costs of the logits of every token, in phase `forward`: what profilers count as one inference."""
    scope = Scope()
    decoder, bank = job.model(scope)
    counter = SymbolicCounter(scope, job.device)
    scope.record(True)
    with counter, torch.no_grad():
        with scope.within(owner="adapter"):
            bank.begin(0, training=False)
        decoder.logits(pack.to(decoder.device), bank)
    return counter.tally


def generation(job: Job, prompts: Sequence[PackSequence], num_tokens: int) -> Tally:
    """Costs of generating `num_tokens` for each prompt, in phases `prefill` and `decode`; the first token comes out
    of the prefill."""
    scope = Scope()
    decoder, bank = job.model(scope)
    counter = SymbolicCounter(scope, job.device)
    with counter:
        generate(decoder, bank, prompts, max_new_tokens=num_tokens, eos_ids=())
    return counter.tally
