"""Our own form of adapters that PEFT has no counterpart of: the same two files, our names.

`adapter_config.json` holds `peft_type` "PEFTDYNO_" + the method's name and every setting of the method under its own
name; `adapter_model.safetensors` holds each trained tensor under its parameter's name.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
    from peftdyno.engine.families.family import Family


class OwnForm(Method):
    """Reads and writes a method in our own form."""

    @classmethod
    def own_type(cls) -> str:
        """What `peft_type` says; a word that PEFT does not know, so it refuses the folder."""
        return f"PEFTDYNO_{cls.name.upper()}"

    @classmethod
    def recognises(cls, fields: AdapterFields, tensors: AdapterTensors) -> bool:
        return bool(fields.get("peft_type") == cls.own_type())

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"peft_type": self.own_type(), **asdict(bank.methods[run])}, bank.run_tensors(run)

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        method = cls(**read_settings(cls, fields))
        shapes = method.parameters(config)
        return method, {name: tensors.take(name, *shape) for name, shape in shapes.items()}


def read_settings(method: type[Method], adapter: AdapterFields) -> dict[str, Any]:
    """Arguments of a method out of the fields named like them, each of the default's type."""
    settings: dict[str, Any] = {}
    for item in fields(method):
        value = adapter.take(item.name, item.default)
        if isinstance(item.default, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(item.default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(item.default):
            raise adapter.error(item.name, value, f"a value like {item.default!r}")
        settings[item.name] = value
    return settings
