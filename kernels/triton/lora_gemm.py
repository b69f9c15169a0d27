"""y = x W^T + u (s B)^T + b in one Triton product: the low-rank term joins the accumulator before y is written once.

A persistent kernel that walks tiles in groups of rows, so that concurrent tiles share operands in the L2 cache; tiles
come through tensor descriptors, which are the copy engine on Hopper and Blackwell. It is the alternative to the
bordered product of `lora_linear`; the benchmark says where it wins. Backward, the same kernel reads W and A down
their columns: dx = dy W + du A.
x: [N, in]; W: [out, in]; u: [N, P]; up = s B: [out, P]; y: [N, out]; du: [N, P]; down = A: [P, in].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peftdyno.kernels import tuning
from peftdyno.kernels.library import with_spare
from peftdyno.kernels.triton.compiled import WIDE, Compiled, Limits

DEPTH, GROUP = 64, 8


@triton.jit
def _product(
    x, weight, u, factor, bias, y, num_rows, num_columns, K, P,
    BACKWARD: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    NARROW: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % height) * ROWS
        column = tile % (GROUP * across) // height * COLUMNS
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, DEPTH):
            w = weight.load([k, column]) if BACKWARD else weight.load([column, k]).T
            total = tl.dot(x.load([row, k]), w, total, input_precision=PRECISION)
        for p in range(0, P, NARROW):
            f = factor.load([p, column]) if BACKWARD else factor.load([column, p]).T
            total = tl.dot(u.load([row, p]), f, total, input_precision=PRECISION)
        if BIAS:
            at = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + at, mask=at < num_columns, other=0.0).to(tl.float32)[None, :]
        y.store([row, column], total.to(y.dtype))


def suitable(*operands: Tensor) -> bool:
    """Whether descriptors can address the operands: rows dense and 16 bytes aligned."""
    return all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands
    )


def product(x: Tensor, weight: Tensor, u: Tensor, up: Tensor, bias: Tensor | None = None, spare: int = 0) -> Tensor:
    """y, with `spare` columns free to the right of each row."""
    return _launch(x, weight, u, up, bias, with_spare(x.shape[0], weight.shape[0], spare, x), backward=False)


def product_backward(dy: Tensor, weight: Tensor, du: Tensor, down: Tensor) -> Tensor:
    """dx [N, in]."""
    return _launch(dy, weight, du, down, None, dy.new_empty(dy.shape[0], weight.shape[1]), backward=True)


def _launch(
    x: Tensor, weight: Tensor, u: Tensor, factor: Tensor, bias: Tensor | None, y: Tensor, *, backward: bool
) -> Tensor:
    n, out = y.shape
    if n == 0:
        return y
    assert suitable(x, weight, u, factor, y), [t.stride() for t in (x, weight, u, factor, y)]
    narrow = min(64, max(16, triton.next_power_of_2(u.shape[1])))
    shape = n, x.shape[1], out, u.shape[1]
    tile = tuning.tile("lora_gemm_backward" if backward else "lora_gemm", shape, x.device, x.dtype)
    rows, columns = tile.rows, tile.columns
    tiles = triton.cdiv(n, rows) * triton.cdiv(out, columns)
    programs = tuning.multiprocessors(x.device) if x.is_cuda else 2
    wide, thin = ([DEPTH, columns], [narrow, columns]) if backward else ([columns, DEPTH], [columns, narrow])
    blocks = ([rows, DEPTH], wide, [rows, narrow], thin, [rows, columns])
    operands = [TensorDescriptor.from_tensor(t, b) for t, b in zip((x, weight, u, factor, y), blocks, strict=True)]
    _product[(min(programs, tiles),)](
        *operands[:4], u if bias is None else bias, operands[4], n, out, x.shape[1], u.shape[1],
        BACKWARD=backward, BIAS=bias is not None, ROWS=rows, COLUMNS=columns, DEPTH=DEPTH, NARROW=narrow,
        GROUP=GROUP, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _case(name: str, tile: str, weight: str, factor: str, *, narrow: int, backward: bool) -> Compiled:
    signature = {
        "x": "tensordesc<bf16[{ROWS},{DEPTH}]>", "weight": f"tensordesc<bf16[{weight}]>",
        "u": "tensordesc<bf16[{ROWS},{NARROW}]>", "factor": f"tensordesc<bf16[{factor}]>", "bias": "*bf16",
        "y": "tensordesc<bf16[{ROWS},{COLUMNS}]>", "num_rows": "i32", "num_columns": "i32", "K": "i32", "P": "i32",
    }  # fmt: skip
    constants = {"DEPTH": DEPTH, "NARROW": narrow, "GROUP": GROUP, "PRECISION": "tf32"}
    constants |= {"BACKWARD": backward, "BIAS": not backward}
    limits = Limits(registers=255, spills_fp32=80, matrix=WIDE)  # on sm_89, at half of the registers
    return Compiled(name, _product, signature, constants, limits=limits, tile=tile, sizes=("ROWS", "COLUMNS"))


def _cases(narrow: int) -> list[Compiled]:
    """Of `narrow` ranks at a time."""
    forward, backward = ("{COLUMNS},{DEPTH}", "{COLUMNS},{NARROW}"), ("{DEPTH},{COLUMNS}", "{NARROW},{COLUMNS}")
    name = f"lora: fused product, {narrow} ranks"
    return [
        _case(name, "lora_gemm", *forward, narrow=narrow, backward=False),
        _case(f"{name}, backward", "lora_gemm_backward", *backward, narrow=narrow, backward=True),
    ]


COMPILED = _cases(16) + _cases(64)
