"""Our side of a training step: fixed batches, the parts of the training loop without its log and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.compare.handover import hand_over
from peftdyno.bench.compare.memory import resident_peak, storage_bytes, traced_peak
from peftdyno.bench.compare.rows import TokenRow
from peftdyno.bench.compare.turns import timed
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.adapters import method_class
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.families import Family
from peftdyno.engine.graphs import GraphChoice
from peftdyno.engine.optim import AdamW, OptimConfig, clip_factors, gradient_norms
from peftdyno.engine.pack import Pack, build_pack
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.panels import held_bytes, packed_weights
from peftdyno.engine.recorded_steps import LEAST_TAPED, step_graphs
from peftdyno.engine.replayed_steps import ReplayedSteps
from peftdyno.engine.sources import DTYPES, load_model
from peftdyno.engine.step_tapes import NUM_CHECKED
from peftdyno.engine.train import forward_backward


@cache
def base(model: str, dtype: str = "bf16") -> tuple[Decoder, Family]:
    """The frozen model, loaded once a process; fp32 means bf16's values in fp32, as on the other side."""
    config, weights, _, files = load_model(model, DTYPES["bf16"])
    if dtype == "fp32":
        weights = replace(_widened(weights), layers=[_widened(layer) for layer in weights.layers])
    return Decoder(config, weights), files.family


def _widened(weights: Any) -> Any:
    """The same with every tensor of its own in fp32."""
    tensors = {name: value.float() for name, value in vars(weights).items() if isinstance(value, Tensor)}
    return replace(weights, **tensors)


def new_bank(decoder: Decoder, method: str, options: Mapping[str, Any], seeds: Sequence[int]) -> AdapterBank:
    """A bank at its start. Options come as JSON: lists are tuples."""
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return AdapterBank.create(decoder.config, [method_class(method)(**given)] * len(seeds), seeds, decoder.weights)


@dataclass
class OurSteps:
    """Steps of AdamW with clipping at a constant rate over fixed batches, one after another and round again."""

    model: str
    method: str
    options: dict[str, Any]
    batches: list[list[dict[str, Any]]]
    learning_rate: float
    share_prefix: bool = False
    seed: int = 0
    dtype: str = "bf16"
    recorded: ReplayedSteps | None = None
    """What steps are replayed from, where they are."""

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.decoder, self.family = base(self.model, self.dtype)
        self.bank = new_bank(self.decoder, self.method, self.options, [self.seed])
        self.optimizer = AdamW.create(self.bank)
        cls = method_class(self.method)
        self.optim = OptimConfig(learning_rate=self.learning_rate, weight_decay=cls.weight_decay)
        self.packs = [self._pack(batch) for batch in self.batches]
        self.ledger = Ledger(self.decoder.scope, on=False)
        self.step = 0

    def _pack(self, batch: Sequence[Mapping[str, Any]]) -> Pack:
        rows = [TokenRow.read(row) for row in batch]
        total = sum(row.num_labels for row in rows)
        sequences = [
            PackSequence(tokens=row.tokens, num_prompt=row.num_prompt, ordinal=i, weight=1 / total)
            for i, row in enumerate(rows)
        ]
        return build_pack(sequences, share_prefix=self.share_prefix, root=self.bank.root, losses_only=True)

    def save(self, folder: str) -> None:
        """Hand the adapter over in PEFT's form."""
        hand_over(self.bank, 0, Path(folder), self.family)

    def trajectory(self, steps: int) -> dict[str, list[float]]:
        """Losses and gradient norms of the next steps."""
        found = [self.take_step() for _ in range(steps)]
        return {"losses": [loss for loss, _ in found], "norms": [norm for _, norm in found]}

    def measure(self, steps: int) -> dict[str, float]:
        """Seconds of some steps."""
        return timed(lambda: self._run(steps))

    def settle(self, graphs: GraphChoice = "auto") -> None:
        """Come to where a long training is: steps that it replays are recorded now and have been checked."""
        self.recorded = step_graphs(graphs, self.decoder, self.bank, LEAST_TAPED)
        if self.recorded is not None:
            self._run(len(self.packs) * (1 + NUM_CHECKED))

    def measure_packed(self, steps: int) -> dict[str, float]:
        """Seconds of some steps after one that is not counted, with panels of the weights while they last."""
        with packed_weights(self.decoder, "on", backward=True):
            self.take_step()
            return self.measure(steps)

    def measure_memory(self) -> dict[str, float]:
        """One step's time and the largest resident set while it ran."""
        return resident_peak(self.take_step)

    def allocated_peak(self) -> dict[str, int] | None:
        """Bytes that PyTorch's allocator held at most during a step; None where nothing records it."""
        traced = traced_peak(self.take_step)
        state = [self.bank.flat, self.bank.gradient, self.optimizer.first, self.optimizer.second]
        held = storage_bytes([*self.decoder.weights.tensors(), *state])
        panels = held_bytes(self.decoder, backward=True)
        return None if traced is None else {"held": held, "step": traced, "panels": panels}

    def _run(self, steps: int) -> int:
        for _ in range(steps):
            self.take_step()
        return steps

    def take_step(self) -> tuple[float, float]:
        """Forward, backward, clip, update: the loss and the gradient's norm."""
        pack = self.packs[self.step % len(self.packs)]
        losses, _ = forward_backward(self.decoder, self.bank, [pack], self.step, self.ledger, self.recorded)
        norms = gradient_norms(self.bank)
        clips = clip_factors(norms, [self.optim])
        self.optimizer.step(self.bank, [self.optim], [self.learning_rate], clips, [True])
        self.step += 1
        return losses[0], norms[0]
