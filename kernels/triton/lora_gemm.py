"""y = x W^T + u (s B)^T in one Triton product: the low-rank term joins the accumulator before y is written once.

A persistent kernel that walks tiles in groups of rows, so that concurrent tiles share operands in the L2 cache; tiles
come through tensor descriptors, which are the copy engine on Hopper and Blackwell. It is the alternative to the
bordered product of `lora_linear`; the benchmark says where it wins.
x: [N, in]; W: [out, in]; u: [N, P]; up = s B: [out, P]; y: [N, out].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import Compiled, Limits

DEPTH, GROUP = 64, 8


@triton.jit
def _product(
    x, weight, u, up, y, num_rows, num_columns, K, P,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * ROWS
        column = tile % (GROUP * across) // height * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            total = tl.dot(x.load([row, k]), weight.load([column, k]).T, total, input_precision=PRECISION)
        for p in range(0, P, NARROW):
            total = tl.dot(u.load([row, p]), up.load([column, p]).T, total, input_precision=PRECISION)
        y.store([row, column], total.to(y.dtype))


def suitable(*operands: Tensor) -> bool:
    """Whether descriptors can address the operands: rows dense and 16 bytes aligned."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands
    )


def product(x: Tensor, weight: Tensor, u: Tensor, up: Tensor, spare: int = 0) -> Tensor:
    """y, with `spare` columns free to the right of each row."""
    n, out = x.shape[0], weight.shape[0]
    y = with_spare(n, out, spare, x)
    if n == 0:
        return y
    assert suitable(x, weight, u, up, y), [t.stride() for t in (x, weight, u, up, y)]
    narrow = min(64, max(16, triton.next_power_of_2(u.shape[1])))
    tile = tuning.tile("lora_gemm", x.device)
    rows, columns = tile.rows, tile.columns
    tiles = triton.cdiv(n, rows) * triton.cdiv(out, columns)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    blocks = ([rows, DEPTH], [columns, DEPTH], [rows, narrow], [columns, narrow], [rows, columns])
    operands = [TensorDescriptor.from_tensor(t, b) for t, b in zip((x, weight, u, up, y), blocks, strict=True)]
    _product[(min(programs, tiles),)](
        *operands, n, out, x.shape[1], u.shape[1], ROWS=rows, COLUMNS=columns, DEPTH=DEPTH, NARROW=narrow,
        GROUP=GROUP, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


_TYPES = {
    "x": "tensordesc<bf16[{ROWS},{DEPTH}]>", "weight": "tensordesc<bf16[{COLUMNS},{DEPTH}]>",
    "u": "tensordesc<bf16[{ROWS},{NARROW}]>", "up": "tensordesc<bf16[{COLUMNS},{NARROW}]>",
    "y": "tensordesc<bf16[{ROWS},{COLUMNS}]>", "num_rows": "i32", "num_columns": "i32", "K": "i32", "P": "i32",
}  # fmt: skip
COMPILED = [
    Compiled(
        "lora: fused product",
        _product,
        _TYPES,
        {"DEPTH": DEPTH, "NARROW": 16, "GROUP": GROUP, "PRECISION": "tf32"},
        limits=Limits(registers=255, matrix=True),
        tile="lora_gemm",
        sizes=("ROWS", "COLUMNS"),
    )
]
