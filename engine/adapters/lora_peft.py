"""PEFT's LORA form, as `lora` and `bitfit` read it: settings, the fields that must be neutral, expected tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftdyno.engine.adapters.targets import (
    Place,
    chosen_places,
    grouped,
    linear_places,
    module_path,
    place_name,
    read_targets,
)
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families.family import Family

if TYPE_CHECKING:
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors

STARTS: Mapping[str, Any] = {"kaiming": True, "gaussian": "gaussian", "random": False, "pissa": "pissa"}
"""Our names of starts -> PEFT's `init_lora_weights`."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, True),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "loftq_config": ({}, None),
    "eva_config": (None,),
    "corda_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "ensure_weight_tying": (False,),
}
"""PEFT's fields for what is not supported, with the values that change nothing. A linear layer ignores the first."""

WITHOUT_EFFECT = ("megatron_core", "qalora_group_size", "runtime_config")
"""Fields that are read only where a neutral field is not neutral."""


def is_bitfit(fields: AdapterFields, tensors: AdapterTensors) -> bool:
    """Whether the LORA form holds biases alone: rank 1, factor 1, a bias on B, and A = B = 0."""
    if fields.get("peft_type") != "LORA" or fields.get("lora_bias") is not True:
        return False
    plain = fields.get("r") == 1 and fields.get("lora_alpha") == 1
    patterns = any(fields.get(name) for name in ("rank_pattern", "alpha_pattern", "use_dora"))
    factors = [t for name, t in tensors.items() if name.endswith(("lora_A.weight", "lora_B.weight"))]
    return plain and not patterns and bool(factors) and not any(t.any() for t in factors)


def read_settings(fields: AdapterFields, config: DecoderConfig, family: Family) -> dict[str, Any]:
    """Arguments of `LoRA` out of PEFT's fields. UserError that names a field which is not understood."""
    for name, harmless in NEUTRAL.items():
        fields.neutral(name, *harmless)
    for name in WITHOUT_EFFECT:
        fields.take(name)
    places = linear_places(config)
    targets, layers = read_targets(fields, places, family)
    chosen = chosen_places(places, targets, layers)
    rank, alpha = fields.size("r", 8), fields.number("lora_alpha", 8)
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": fields.number("lora_dropout", 0.0),
        "target_modules": targets,
        "layers_to_transform": layers,
        "rank_pattern": _read_pattern(fields, "rank_pattern", chosen, family, rank),
        "alpha_pattern": _read_pattern(fields, "alpha_pattern", chosen, family, alpha),
        "rank_stabilised": fields.flag("use_rslora"),
        "init": _read_start(fields),
        "bias": fields.take("bias", "none"),
        "lora_bias": fields.flag("lora_bias"),
        "dora": fields.flag("use_dora"),
    }


def _read_pattern(
    fields: AdapterFields, name: str, chosen: Sequence[Place], family: Family, default: Any
) -> dict[str, Any]:
    """PEFT's rule: the first key that matches the path, or its end after a dot, as a regular expression."""
    table = fields.table(name)
    for key, value in table.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (name == "alpha_pattern" and isinstance(value, float))) or value <= 0:
            raise fields.error(name, table, f"a positive number for '{key}'")
    values: dict[Place, Any] = {}
    try:
        for place in chosen:
            path = module_path(family, place)
            values[place] = next((v for k, v in table.items() if re.match(rf"(.*\.)?({k})$", path)), default)
    except re.error as error:
        raise fields.error(name, table, f"regular expressions ({error})") from error
    return grouped(chosen, values, default, place_name)


def _read_start(fields: AdapterFields) -> str:
    value = fields.take("init_lora_weights", True)
    for name, theirs in STARTS.items():
        if value is theirs or (isinstance(value, str) and value == theirs):
            return name
    raise fields.error("init_lora_weights", value, "true, false, 'gaussian' or 'pissa'; others are not supported")


def check_bias(bias: str) -> None:
    """UserError for an unknown choice of trained biases."""
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"lora.bias '{bias}' is not one of none, all, lora_only")


def neutral_fields() -> dict[str, Any]:
    """The fields of `NEUTRAL` as PEFT writes them, without those that older versions do not know."""
    known = ("fan_in_fan_out", "modules_to_save", "megatron_config", "loftq_config", "layer_replication")
    return {name: NEUTRAL[name][0] for name in known}
