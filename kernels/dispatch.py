"""Which implementation of an operator runs: decided by device, what is built, and the user's explicit choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

Choice = Literal["auto", "reference", "cpu", "triton"]

_choice: Choice = "auto"
_stood_for: torch.device | None = None


def use(choice: str) -> None:
    """Set the implementation for every operator of this process; an explicit choice never falls back.

    Raises ValueError for an unknown name.
    """
    global _choice
    if choice not in get_args(Choice):
        raise ValueError(f"--kernels '{choice}' is not one of {', '.join(get_args(Choice))}")
    _choice = choice  # type: ignore[assignment]


def current() -> Choice:
    """The choice in force."""
    return _choice


@contextmanager
def shapes_of(device: torch.device) -> Iterator[None]:
    """Within it, tensors of the meta device stand for those of `device`: what runs there is sized, not computed."""
    global _stood_for
    before, _stood_for = _stood_for, device
    try:
        yield
    finally:
        _stood_for = before


def meant(device: torch.device) -> torch.device:
    """The device that a tensor's device is, or stands for."""
    return device if _stood_for is None or device.type != "meta" else _stood_for


def choose(name: str, implementations: Mapping[str, Any], device: torch.device) -> str:
    """Name of the implementation of operator `name` to run on `device`.

    `auto` prefers the one made for the device and takes the reference where there is none. Raises RuntimeError
    where an explicit choice does not exist.
    """
    if _choice == "auto":
        fast = "triton" if device.type == "cuda" else "cpu"
        return fast if fast in implementations else "reference"
    if _choice not in implementations:
        raise RuntimeError(f"operator {name} has no '{_choice}' implementation; it has {', '.join(implementations)}")
    return _choice


def explain(name: str, implementations: Mapping[str, Any], device: torch.device) -> str:
    """Which implementation of operator `name` runs on `device`, and why: what `peftdyno env` shows."""
    taken = choose(name, implementations, device)
    if _choice != "auto":
        return f"{taken} (chosen by --kernels)"
    if taken == "reference":
        fast = "triton" if device.type == "cuda" else "cpu"
        return f"reference (plain PyTorch: there is no '{fast}' implementation here)"
    return f"{taken} (made for {device.type})"
