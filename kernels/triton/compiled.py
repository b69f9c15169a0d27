"""What a kernel may use once compiled: each kernel's file lists its variants with their limits.

`peftdyno.kernels.triton.ahead` compiles the list for every architecture without a GPU and holds the limits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peftdyno.kernels.tuning import SHIPPED, SHIPPED_FP32

# Multiplications and additions of a kernel are contracted, as all that was checked here is: the default ends with
# Triton 3.10, and 3.9 warns of it at every first compilation. Who sets the variable is obeyed.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

NARROW = {80: "HMMA", 90: "HMMA", 100: "HMMA"}
"""Architecture -> the only tensor-core instructions of a kernel whose tiles are too low, or whose operands come from
registers, for the wide ones of Hopper and Blackwell."""
WIDE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""Of a kernel that runs at the rate of each generation; to lose them would show in no other limit."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most registers a thread, spilled bytes and bytes of shared memory; `matrix`: its tensor-core instructions."""

    registers: int = 128
    spills: int = 16
    """Four values a thread: the assembler trades so many of its own accord for more programs at a time, another set of
    kernels in each of its versions. Kernels whose tile is too large for their registers spill hundreds of bytes."""
    spills_sm_100: int = 16
    """Accumulators lie in tensor memory there and pass through registers; no GPU of the kind was at hand."""
    spills_fp32: int = 32
    """Of the variant for 32-bit elements, which takes more registers."""
    shared: int = 227 * 1024
    """With sm_80's tiles it is 99 KB in any case, which is what consumers' GPUs have."""
    matrix: Mapping[int, str] = field(default_factory=dict)
    work: Mapping[int, float] = field(default_factory=dict)
    """Architecture -> most work, of a kernel that instructions bound: `MachineCode.longest`, an element."""


@dataclass(frozen=True)
class Compiled:
    """One kernel with its argument types, constants and launch options, as it is used at full size.

    Where `tile` names an entry of `tuning.SHIPPED`, its sizes are the constants `sizes`, and its warps and stages hold.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    limits: Limits = field(default_factory=Limits)
    tile: str = ""
    sizes: tuple[str, str] = ("ROWS", "BLOCK")
    fp32: dict[str, Any] = field(default_factory=dict)
    """Constants that differ for 32-bit elements."""

    def on(self, arch: int) -> Compiled:
        """The case with the tile shipped for an architecture filled in."""
        if not self.tile:
            return self
        tile = SHIPPED_FP32[self.tile] if self.wide else SHIPPED[self.tile][arch]
        constants = self.constants | dict(zip(self.sizes, (tile.rows, tile.columns), strict=True))
        return replace(self, constants=constants, num_warps=tile.warps, num_stages=tile.stages, tile="")

    @property
    def elements_a_thread(self) -> int:
        """Elements of a filled-in tile for each thread; 0 where the kernel has none."""
        rows, columns = (int(self.constants.get(name, 0)) for name in self.sizes)
        return rows * columns // (32 * self.num_warps)

    @property
    def wide(self) -> bool:
        """Whether it multiplies 32-bit elements."""
        return self.constants.get("PRECISION") == "ieee"

    def in_fp32(self) -> Compiled:
        """The case for 32-bit elements: in full precision without tensor cores, within what every GPU has."""
        limits = replace(
            self.limits, registers=255, spills=self.limits.spills_fp32, spills_sm_100=self.limits.spills_fp32
        )
        return replace(
            self,
            name=f"{self.name}, fp32",
            signature={name: kind.replace("bf16", "fp32") for name, kind in self.signature.items()},
            constants=self.constants | {"PRECISION": "ieee"} | self.fp32,
            limits=replace(limits, shared=99 * 1024, matrix={}, work={}),
        )

    @property
    def aligned(self) -> set[str]:
        """Integer arguments that are multiples of 16 at full size: widths and strides."""
        widths = {"D", "F", "V", "K", "N", "width", "columns"}
        return {n for n, t in self.signature.items() if t == "i32" and (n in widths or n.endswith(("stride", "_head")))}
