"""AdamW on a GPU for a stack of runs: one launch, a run's rate, clip and bias corrections read from a small table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from peftdyno.kernels.triton.compiled import Compiled, Limits
from peftdyno.kernels.triton.row_chunks import upload

BLOCK = 2048


@triton.jit
def _update(
    p, g, m, v, runs, width, p_stride, g_stride, m_stride, v_stride, beta1, rest1, beta2, rest2, eps, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1)
    live = tl.load(runs + 5 * run)
    if live > 0:
        rate, clip = tl.load(runs + 5 * run + 1), tl.load(runs + 5 * run + 2)
        correction1, correction2 = tl.load(runs + 5 * run + 3), tl.load(runs + 5 * run + 4)
        columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # all weights may pass 2**31 values
        mask = columns < width
        j = run.to(tl.int64)
        p += j * p_stride
        m += j * m_stride
        v += j * v_stride
        grad = tl.load(g + j * g_stride + columns, mask=mask, other=0.0) * clip
        first = beta1 * tl.load(m + columns, mask=mask, other=0.0) + rest1 * grad
        second = beta2 * tl.load(v + columns, mask=mask, other=0.0) + rest2 * grad * grad
        value = tl.load(p + columns, mask=mask, other=0.0) * (1.0 - rate * decay)
        value -= rate * (first / correction1) / (tl.sqrt(second / correction2) + eps)
        tl.store(m + columns, first, mask=mask)
        tl.store(v + columns, second, mask=mask)
        tl.store(p + columns, value, mask=mask)


def update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rates: Sequence[float],
    clips: Sequence[float],
    steps: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """In place on p, m and v [R, ...]; a run at step 0 is left as it is."""
    if p.numel() == 0:
        return
    rows = [
        (step > 0, rate, clip, 1 - beta1 ** max(step, 1), 1 - beta2 ** max(step, 1))
        for rate, clip, step in zip(rates, clips, steps, strict=True)
    ]
    p_rows, g_rows, m_rows, v_rows = (t.view(len(rows), -1) for t in (p, g, m, v))
    width = p_rows.shape[1]
    _update[(triton.cdiv(width, BLOCK), len(rows))](
        p_rows, g_rows, m_rows, v_rows, upload(np.array(rows, np.float32), p.device), width,
        *(t.stride(0) for t in (p_rows, g_rows, m_rows, v_rows)),
        beta1, 1 - beta1, beta2, 1 - beta2, eps, decay, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


COMPILED = [
    Compiled(
        "adamw_",
        _update,
        {
            "p": "*fp32", "g": "*fp32", "m": "*fp32", "v": "*fp32", "runs": "*fp32", "width": "i32",
            "p_stride": "i32", "g_stride": "i32", "m_stride": "i32", "v_stride": "i32", "beta1": "fp32",
            "rest1": "fp32", "beta2": "fp32", "rest2": "fp32", "eps": "fp32", "decay": "fp32",
        },
        {"BLOCK": BLOCK},
        num_warps=8,
        limits=Limits(registers=64, shared=0),
    )
]  # fmt: skip
