"""Model families, found by looking through this folder: a file that defines FAMILY is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families.family import Family

__all__ = ["Family", "config_from_hf", "families", "family_of", "family_of_hf"]


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family by its name."""
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found


def family_of(config: DecoderConfig) -> Family:
    """The family a config belongs to."""
    return families()[config.family]


def family_of_hf(config: Mapping[str, Any]) -> Family:
    """The family that reads a Hugging Face config, by its `model_type`."""
    model_type = config.get("model_type")
    by_type = {name: family for family in families().values() for name in family.model_types}
    if model_type is None:
        raise UserError("field 'model_type' is missing")
    if model_type not in by_type:
        raise unknown("model_type", str(model_type), by_type)
    return by_type[model_type]


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config; raises UserError that names the field it does not understand."""
    try:
        return family_of_hf(config).from_hf(config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
