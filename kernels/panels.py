"""Frozen weights kept a second time as panels, which products read faster than the weights themselves.

A panel is 32 rows of W [out, in] with pairs of columns side by side, as the processor's tiles and dot products take
them; for the backward product dy W 32 columns of W with pairs of rows. Only bf16 weights on processors that multiply
bf16 have this form; it must be dropped when it is no longer used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftdyno.kernels import cpu, dispatch


def panel_bytes(weight: Tensor, *, backward: bool = False) -> int:
    """Bytes that the panels of a weight take, with `backward` those for dy W too; 0 where products have no use for
    them."""
    if not cpu.AVAILABLE or weight.device.type != "cpu" or dispatch.current() not in ("auto", "cpu"):
        return 0
    held: int = torch.ops.peftdyno_cpu.packed_bytes(list(weight.shape), weight.dtype == torch.bfloat16, backward)
    return held


def keep_panels(weight: Tensor, *, backward: bool = False) -> int:
    """Keep the panels of a weight until `drop_panels`; the bytes they take. A weight that changes is read itself."""
    held: int = torch.ops.peftdyno_cpu.keep_packed(weight, backward)
    return held


def drop_panels(weight: Tensor) -> None:
    """Forget the panels of a weight."""
    torch.ops.peftdyno_cpu.forget_packed(weight)
