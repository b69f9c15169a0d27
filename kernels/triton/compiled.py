"""What a kernel may use once compiled: each kernel's file lists its variants with their limits.

`peftdyno.kernels.triton.ahead` compiles the list for every architecture without a GPU and holds the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most registers a thread, spilled bytes and bytes of shared memory; `matrix`: tensor cores must be used."""

    registers: int = 128
    spills: int = 0
    shared: int = 100 * 1024
    matrix: bool = False


@dataclass(frozen=True)
class Compiled:
    """One kernel with its argument types, constants and launch options, as it is used at full size."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    limits: Limits = field(default_factory=Limits)

    @property
    def aligned(self) -> set[str]:
        """Integer arguments that are multiples of 16 at full size: widths and strides."""
        widths = {"D", "F", "V", "K", "N", "width", "columns"}
        return {n for n, t in self.signature.items() if t == "i32" and (n in widths or n.endswith("stride"))}
