"""Bench: a step that can be run again and again, on random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.border import fit_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack
from peftdyno.engine.weights import random_weights


@dataclass
class Bench:
    """A model of random weights, whose values no cost depends on, a bank, and a pack to train on."""

    decoder: Decoder
    bank: AdapterBank
    optimizer: AdamW
    pack: Pack

    @classmethod
    def of(cls, job: Job, batch: int, length: int) -> Bench:
        """Everything that a step needs, on the job's device, with the borders that a training has there."""
        weights = random_weights(job.config, job.dtype, device=job.device)
        bank = AdapterBank.create(job.config, job.methods, range(len(job.methods)), weights)
        fit_borders(weights, bank, torch.device(job.device))
        pack = job.plain_pack(batch, length).to(job.device)
        return cls(Decoder(job.config, weights), bank, AdamW.create(bank), pack)

    def step(self, ledger: Ledger) -> None:
        """One training step at rate 0."""
        run_step(self.decoder, self.bank, self.optimizer, [self.pack], ledger)
        ledger.end_step()
