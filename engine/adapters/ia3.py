"""IA3: trained scales on the outputs of projections and on the input of down_proj (Liu et al. 2022, sec. 3.3).
y = l * (W x), and y = W (l * x) at down_proj, with l trained and * entry by entry (arXiv:2205.05638)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from peftdyno.engine.adapters.method import MODULES, SITES, Method, module_bias, module_rows, module_weight
from peftdyno.engine.adapters.targets import (
    Place,
    check_targets,
    chosen_places,
    linear_places,
    module_path,
    peft_name,
    peft_targets,
    place_name,
    read_targets,
)
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families.family import Family
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import Columns, LinearEdits

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Each target's output is multiplied by a vector that starts at one; down_proj's input instead where
    `feedforward` is set. Without it, down_proj is scaled at its output, as in PEFT-Bench's published runs."""

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: bool = True

    def __post_init__(self) -> None:
        check_targets("ia3.target_modules", self.target_modules, MODULES)

    def places(self, config: DecoderConfig) -> tuple[Place, ...]:
        """The scaled projections."""
        return chosen_places(linear_places(config), self.target_modules)

    def scales_input(self, place: Place) -> bool:
        """Whether a projection's input is scaled, not its output."""
        return self.feedforward and place[1] == "down_proj"

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        return {
            f"{place_name(place)}.scale": (config.linear_shape(place[1])[int(self.scales_input(place))],)
            for place in self.places(config)
        }

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        return np.ones(shape, dtype=np.float32)

    def linear(self, bank: AdapterBank, layer: int, site: str) -> LinearEdits | None:
        rows = module_rows(bank.config, site)
        scales = tuple(
            Columns(start=rows[module][0], values=bank.parameters[name])
            for module in SITES[site]
            if (name := f"layers.{layer}.{module}.scale") in bank.parameters and not self.scales_input((layer, module))
        )
        return LinearEdits(scales=scales) if scales else None

    def glu_scale(self, bank: AdapterBank, layer: int) -> Tensor | None:
        return bank.parameters.get(f"layers.{layer}.down_proj.scale") if self.feedforward else None

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        values = bank.run_tensors(run)
        for place in self.places(bank.config):
            scale = values[f"{place_name(place)}.scale"]
            weight, bias = (f(weights, bank.config, *place) for f in (module_weight, module_bias))
            assert weight is not None
            weight.copy_(weight * (scale if self.scales_input(place) else scale[:, None]))
            if bias is not None and not self.scales_input(place):
                bias.copy_(bias * scale)
        return bank.config

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, places = bank.run_tensors(run), self.places(bank.config)
        targets = peft_targets(family, linear_places(bank.config), places)
        inputs = [place for place in places if self.scales_input(place)]
        fields = {
            "peft_type": "IA3",
            "target_modules": targets,
            "feedforward_modules": [t for t in targets if inputs and t.endswith("down_proj")],
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "init_ia3_weights": True,
        }
        tensors = {
            peft_name(family, place, "ia3_l"): values[f"{place_name(place)}.scale"].reshape(self._shape(place))
            for place in places
        }
        return fields, tensors

    def _shape(self, place: Place) -> tuple[int, int]:
        """PEFT's shape of a scale: a row for an input, a column for an output."""
        return (1, -1) if self.scales_input(place) else (-1, 1)

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        fields.neutral("fan_in_fan_out", False, True)
        fields.neutral("modules_to_save", None, [])
        fields.flag("init_ia3_weights", True)
        targets, _ = read_targets(fields, linear_places(config), family)
        places = chosen_places(linear_places(config), targets)
        method = cls(target_modules=targets, feedforward=_read_feedforward(fields, places, family))
        values = {}
        for place in places:
            (size,) = method.parameters(config)[f"{place_name(place)}.scale"]
            shape = (1, size) if method.scales_input(place) else (size, 1)
            values[f"{place_name(place)}.scale"] = tensors.take(peft_name(family, place, "ia3_l"), *shape).flatten()
        return method, values


def _read_feedforward(fields: AdapterFields, places: tuple[Place, ...], family: Family) -> bool:
    """PEFT's rule: a list names the ends of paths, a string is a regular expression of the whole path, so that
    the plain string `down_proj` matches nothing."""
    value = fields.take("feedforward_modules")
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        inputs = [place for place in places if module_path(family, place).endswith(tuple(value))]
    elif isinstance(value, str):
        inputs = [place for place in places if re.fullmatch(value, module_path(family, place))]
    else:
        raise fields.error("feedforward_modules", value, "a list of modules or a regular expression")
    down = [place for place in places if place[1] == "down_proj"]
    if inputs and inputs != down:
        raise fields.error("feedforward_modules", value, "down_proj in all adapted layers, or nothing")
    return inputs == down
