"""Methods of parameter-efficient fine-tuning, one file each; `METHODS` finds them by name."""

from __future__ import annotations

import importlib
import pkgutil

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.errors import unknown


def _registered() -> dict[str, type[Method]]:
    """Every subclass of Method with a name of its own, from every file of this folder."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in vars(value):
                found[value.name] = value
    return found


METHODS = _registered()
"""Name -> method, e.g. `METHODS["lora"](rank=8)`."""


def method_class(name: str) -> type[Method]:
    """The method of a name; UserError with the closest names otherwise."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
