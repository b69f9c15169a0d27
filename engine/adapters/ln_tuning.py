"""LN-tuning: the weights of the norms are trained and nothing else (Zhao et al. 2024).
y = w * x / rms(x), with w trained from the base's weight (arXiv:2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.targets import (
    NORMS,
    Place,
    check_targets,
    chosen_places,
    norm_places,
    peft_name,
    peft_targets,
    place_name,
    read_targets,
)
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families.family import Family
from peftdyno.engine.weights import DecoderWeights

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors


@dataclass(frozen=True, kw_only=True)
class LNTuning(Method):
    """Each target norm has a weight of its own that starts as the base's; without targets, every norm there is."""

    name: ClassVar[str] = "ln-tuning"
    peft_type: ClassVar[str] = "LN_TUNING"

    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_targets("ln-tuning.target_modules", self.target_modules or (), (*NORMS, "final_norm"))

    def places(self, config: DecoderConfig) -> tuple[Place, ...]:
        """The trained norms."""
        every = norm_places(config)
        return every if self.target_modules is None else chosen_places(every, self.target_modules)

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        sizes = {"q_norm": config.head_dim, "k_norm": config.head_dim}
        return {place_name(place): (sizes.get(place[1], config.hidden_size),) for place in self.places(config)}

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        return _norm_weight(weights, name)

    def norm(self, bank: AdapterBank, layer: int, name: str) -> Tensor | None:
        return bank.parameters.get(place_name((layer, name)))

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        for name, value in bank.run_tensors(run).items():
            _norm_weight(weights, name).copy_(value)
        return bank.config

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, places = bank.run_tensors(run), self.places(bank.config)
        fields = {
            "peft_type": "LN_TUNING",
            "target_modules": peft_targets(family, norm_places(bank.config), places),
            "exclude_modules": None,
            "modules_to_save": None,
        }
        names = {place: peft_name(family, place, "ln_tuning_layers.weight") for place in places}
        return fields, {name: values[place_name(place)] for place, name in names.items()}

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        fields.neutral("modules_to_save", None, [])
        targets, _ = read_targets(fields, norm_places(config), family)
        every = norm_places(config)
        method = cls(target_modules=None if chosen_places(every, targets) == every else targets)
        shapes, values = method.parameters(config), {}
        for place in method.places(config):
            name = peft_name(family, place, "ln_tuning_layers.weight")
            values[place_name(place)] = tensors.take(name, *shapes[place_name(place)])
        return method, values


def _norm_weight(weights: DecoderWeights, name: str) -> Tensor:
    """The base's weight of a norm by its place's name."""
    *path, kind = name.split(".")
    weight: Tensor = getattr(weights.layers[int(path[1])], kind) if path else weights.final_norm
    return weight
