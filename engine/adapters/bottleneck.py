"""Bottleneck adapters, a small MLP on the way to the residual stream: in sequence after attention and MLP (Houlsby
et al. 2019) or the MLP alone (Pfeiffer et al. 2021), or parallel to them (He et al. 2022, table 1).
y = h + s (up f(down z + b) + c), with h the output of attention or MLP and z = h (in sequence) or what entered it
(parallel) (arXiv:1902.00751, arXiv:2005.00247, arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from peftdyno.engine.adapters.encoder import uniform_start
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import TokenRuns

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank

Mode = Literal["sequential", "parallel"]
PLACES = ("attention", "mlp")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": relu, "gelu": gelu, "silu": silu}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """y = h + s (up f(down z + b) + c) with h the output of attention or MLP (`places`) and z = h (sequential) or what
    entered it (parallel). down [m, D] with m = D / `reduction`; up starts at zero, so the model starts as the base."""

    name: ClassVar[str] = "adapter"
    learning_rate: ClassVar[float] = 2e-6
    weight_decay: ClassVar[float] = 1e-3
    per_run: ClassVar[tuple[str, ...]] = ("scaling",)
    unmergeable: ClassVar[str] = "its activation has no place in the base model"

    mode: Mode = "sequential"
    places: tuple[str, ...] = PLACES
    reduction: int = 16
    activation: str = "tanh"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise unknown("adapter.mode", self.mode, get_args(Mode))
        if self.activation not in ACTIVATIONS:
            raise unknown("adapter.activation", self.activation, ACTIVATIONS)
        if not self.places:
            raise UserError(f"adapter.places is empty; choose among {', '.join(PLACES)}")
        for place in self.places:
            if place not in PLACES:
                raise unknown("adapter.places entry", place, PLACES)
        if self.reduction < 1:
            raise UserError(f"adapter.reduction {self.reduction} must be at least 1")

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        width = config.hidden_size
        inner = max(width // self.reduction, 1)
        shapes = {"down": (inner, width), "down_bias": (inner,), "up": (width, inner), "up_bias": (width,)}
        return {
            f"layers.{layer}.{place}.{name}": shape
            for layer in range(config.num_hidden_layers)
            for place in PLACES
            if place in self.places
            for name, shape in shapes.items()
        }

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        if name.endswith(".down"):
            return uniform_start(random, shape, shape[1])
        return np.zeros(shape, dtype=np.float32)

    def branch(self, bank: AdapterBank, layer: int, place: str, entered: Tensor, x: Tensor, runs: TokenRuns) -> Tensor:
        if place not in self.places:
            return x
        source = entered if self.mode == "parallel" else x
        names = ("down", "down_bias", "up", "up_bias")
        stacked = (bank.parameters[f"layers.{layer}.{place}.{name}"].to(x.dtype).unbind(0) for name in names)
        pieces = zip(runs.split(x), runs.split(source), bank.methods, *stacked, strict=True)
        return torch.cat([_adapted(*piece) for piece in pieces])


def _adapted(
    x: Tensor, source: Tensor, method: Method, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
) -> Tensor:
    """One run's rows with its adapter added."""
    assert isinstance(method, Bottleneck)
    inner = ACTIVATIONS[method.activation](linear(source, down, down_bias))
    return x + method.scaling * linear(inner, up, up_bias)
