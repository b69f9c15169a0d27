"""BitFit: trained biases on chosen projections (Ben Zaken et al. 2022), beside those that the base has.
y = W x + c + b, with b trained and c the base's own bias, if any (arXiv:2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from peftdyno.engine.adapters.lora_peft import is_bitfit, neutral_fields, read_settings
from peftdyno.engine.adapters.method import MODULES, SITES, Method, module_rows
from peftdyno.engine.adapters.targets import (
    Place,
    check_targets,
    chosen_places,
    linear_places,
    peft_name,
    peft_targets,
    place_name,
)
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.families.family import Family
from peftdyno.engine.merge import add_biases
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import Columns, LinearEdits

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """A bias, at first zero, is added to the output of each target projection.

    PEFT has no type for it; its form is LORA of rank 1 with A = B = 0 and a bias on B.
    """

    name: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "LORA"

    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        check_targets("bitfit.target_modules", self.target_modules, MODULES)

    def places(self, config: DecoderConfig) -> tuple[Place, ...]:
        """The projections with a trained bias."""
        return chosen_places(linear_places(config), self.target_modules)

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        return {f"{place_name(place)}.bias": config.linear_shape(place[1])[:1] for place in self.places(config)}

    def stored_count(self, config: DecoderConfig) -> int:
        zeros = sum(sum(config.linear_shape(module)) for _, module in self.places(config))
        return self.trainable_count(config) + zeros

    def inference_count(self, config: DecoderConfig) -> int:
        return self.trainable_count(config)

    def linear(self, bank: AdapterBank, layer: int, site: str) -> LinearEdits | None:
        rows = module_rows(bank.config, site)
        shifts = tuple(
            Columns(start=rows[module][0], values=bank.parameters[name])
            for module in SITES[site]
            if (name := f"layers.{layer}.{module}.bias") in bank.parameters
        )
        return LinearEdits(shifts=shifts) if shifts else None

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        values = bank.run_tensors(run)
        biases = {place: values[f"{place_name(place)}.bias"] for place in self.places(bank.config)}
        return add_biases(bank.config, weights, biases)

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, places = bank.run_tensors(run), self.places(bank.config)
        tensors = {}
        for place in places:
            out, columns = bank.config.linear_shape(place[1])
            tensors[peft_name(family, place, "lora_A.weight")] = torch.zeros(1, columns)
            tensors[peft_name(family, place, "lora_B.weight")] = torch.zeros(out, 1)
            tensors[peft_name(family, place, "lora_B.bias")] = values[f"{place_name(place)}.bias"]
        fields = {
            **neutral_fields(),
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0.0,
            "target_modules": peft_targets(family, linear_places(bank.config), places),
            "init_lora_weights": True,
            "bias": "none",
            "lora_bias": True,
        }
        return fields, tensors

    @classmethod
    def recognises(cls, fields: AdapterFields, tensors: AdapterTensors) -> bool:
        return is_bitfit(fields, tensors)

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        settings = read_settings(fields, config, family)
        if settings["bias"] != "none":
            raise fields.error("bias", settings["bias"], "'none' beside lora_bias with A = B = 0")
        targets, layers = settings["target_modules"], settings["layers_to_transform"]
        places = chosen_places(linear_places(config), targets, layers)
        method = cls(target_modules=tuple(targets if layers is None else map(place_name, places)))
        values = {}
        for place in places:
            out, columns = config.linear_shape(place[1])
            tensors.take(peft_name(family, place, "lora_A.weight"), 1, columns)
            tensors.take(peft_name(family, place, "lora_B.weight"), out, 1)
            values[f"{place_name(place)}.bias"] = tensors.take(peft_name(family, place, "lora_B.bias"), out)
        return method, values
