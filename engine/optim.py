"""AdamW over a bank's flat masters, and the rate schedule: every run has its own rate, clip factor and step count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.kernels.adamw import ADAMW


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and schedule of one run; defaults are PEFT-Bench's."""

    learning_rate: float
    weight_decay: float = 1e-5
    warmup_ratio: float = 0.1
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rate(self, step: int, num_steps: int) -> float:
        """Rate of a step counted from 0: linear warm-up, then half a cosine down to 0 (or constant)."""
        warmup = math.ceil(self.warmup_ratio * num_steps)
        if step < warmup:
            return self.learning_rate * step / max(warmup, 1)
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - warmup) / max(num_steps - warmup, 1)
        return self.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class AdamW:
    """Moments [R, P] in fp32 and the number of updates each run has made."""

    first: Tensor
    second: Tensor
    updates: list[int]

    @classmethod
    def create(cls, bank: AdapterBank) -> AdamW:
        """Zero moments for a bank."""
        first, second = (bank.flat.new_zeros(bank.flat.shape) for _ in range(2))
        return cls(first, second, [0] * bank.num_runs)

    def step(
        self,
        bank: AdapterBank,
        configs: Sequence[OptimConfig],
        rates: Sequence[float],
        clips: Sequence[float],
        live: Sequence[bool],
    ) -> None:
        """Update the live runs in place from `bank.gradient` times each run's clip factor."""
        self.updates = [n + alive for n, alive in zip(self.updates, live, strict=True)]
        steps = [n if alive else 0 for n, alive in zip(self.updates, live, strict=True)]
        config = configs[0]
        with torch.no_grad():
            for factor, start, stop in bank.groups:
                flat, gradient, first, second = (
                    t[:, start:stop] for t in (bank.flat, bank.gradient, self.first, self.second)
                )
                scaled = [rate * factor for rate in rates]
                ADAMW(
                    flat, gradient, first, second, scaled, list(clips), steps,
                    config.beta1, config.beta2, config.eps, config.weight_decay,
                )  # fmt: skip


def gradient_norms(bank: AdapterBank) -> list[float]:
    """Euclidean norm of each run's gradient."""
    norms: list[float] = torch.linalg.vector_norm(bank.gradient, dim=1).tolist()
    return norms


def clip_factors(norms: Sequence[float], configs: Sequence[OptimConfig]) -> list[float]:
    """What each run's gradient is multiplied by so that its norm is at most the run's limit."""
    return [
        min(1.0, c.max_grad_norm / (norm + 1e-6)) if norm > 0 else 1.0 for norm, c in zip(norms, configs, strict=True)
    ]
