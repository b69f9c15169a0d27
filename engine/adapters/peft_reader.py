"""The two parts of an adapter folder while they are read: what nobody took out of them is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from peftdyno.engine.errors import UserError


class AdapterFields:
    """Fields of adapter_config.json; readers take out what they know."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = dict(values)

    def error(self, name: str, found: Any, expected: str) -> UserError:
        """Error that names the file and the field, what was found and what was expected."""
        return UserError(f"{self.path}: field '{name}' is {found!r}, expected {expected}")

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value, left in place."""
        return self.values.get(name, default)

    def take(self, name: str, default: Any = None) -> Any:
        """Take a field out; the default where it is absent."""
        return self.values.pop(name, default)

    def neutral(self, name: str, *harmless: Any) -> None:
        """Take out a field that is not supported; error unless its value changes nothing."""
        value = self.take(name, harmless[0])
        if not any(value == other and type(value) is type(other) for other in harmless):
            raise UserError(
                f"{self.path}: field '{name}' is {value!r}, which is not supported; expected {harmless[0]!r}"
            )

    def flag(self, name: str, default: bool = False) -> bool:
        """Take out true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Take out a positive integer."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Take out a number."""
        value = self.take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a number")
        return float(value)

    def table(self, name: str) -> dict[str, Any]:
        """Take out a mapping; an absent one is empty."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, value, "a table")
        return value or {}

    def finish(self) -> None:
        """UserError if a field is left that nobody knew; PEFT's null (not set) is none."""
        left = sorted(name for name, value in self.values.items() if value is not None)
        if left:
            name = left[0]
            raise UserError(
                f"{self.path}: field '{name}' ({self.values[name]!r}) is unknown; remove it if it has no effect"
                + (f" (also unknown: {', '.join(left[1:])})" if left[1:] else "")
            )


class AdapterTensors:
    """Tensors of adapter_model.safetensors by name; readers take out what they expect."""

    def __init__(self, path: Path, values: dict[str, Tensor]) -> None:
        self.path = path
        self.values = dict(values)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """What has not been taken."""
        yield from self.values.items()

    def take(self, name: str, *shape: int) -> Tensor:
        """Take a tensor out in fp32 or wider. UserError that names what is missing or of another shape."""
        if name not in self.values:
            raise UserError(f"{self.path}: tensor '{name}' {list(shape)} is missing{self._hint()}")
        tensor = self.values.pop(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self.path}: tensor '{name}' has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor if tensor.element_size() == 8 else tensor.float()

    def _hint(self) -> str:
        left = sorted(self.values)
        return f"; the file has {len(left)} other tensors, the first is '{left[0]}'" if left else ""

    def finish(self) -> None:
        """UserError if a tensor is left that the config does not account for."""
        if self.values:
            left = sorted(self.values)
            raise UserError(
                f"{self.path}: {len(left)} tensors that the config does not account for, the first is '{left[0]}' "
                f"{list(self.values[left[0]].shape)}"
            )
