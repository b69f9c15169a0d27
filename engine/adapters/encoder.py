"""Encoder: virtual positions computed once a step from parameters, whose gradients gather over micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.derived import Derived
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.errors import UserError

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank


@dataclass(frozen=True, kw_only=True)
class Encoder(Method):
    """A method whose hooks read what `encode` computed at the step's start.

    The hooks get leaves cut off from the parameters, so every micro-batch's backward pass ends there; `finish` then
    goes back through the encoder once. Its output does not depend on the tokens, so a shared prefix stays exact.
    """

    num_virtual_tokens: int

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise UserError(f"{self.name}.num_virtual_tokens {self.num_virtual_tokens} must be at least 1")

    def encode(self, bank: AdapterBank) -> tuple[Tensor, ...]:
        """What the hooks need, from the parameters."""
        raise NotImplementedError

    def prepare(self, bank: AdapterBank) -> None:
        bank.state["derived"] = derived = Derived()
        bank.state["leaves"] = tuple(derived.leaf(x) for x in self.encode(bank))

    def finish(self, bank: AdapterBank) -> None:
        bank.state["derived"].carry()


def uniform_start(random: np.random.Generator, shape: tuple[int, ...], columns: int) -> np.ndarray[Any, Any]:
    """Uniform in +-1/sqrt(columns), how PyTorch starts the weight and bias of a linear layer with that many inputs."""
    bound = 1 / math.sqrt(columns)
    return random.uniform(-bound, bound, shape).astype(np.float32)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each run's own linear layer: x [R, n, in], weight [R, out, in], bias [R, out]."""
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
