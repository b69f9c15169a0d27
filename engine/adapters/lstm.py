"""LSTM layers of R runs at once, both directions in step (Hochreiter and Schmidhuber 1997).

With the gates in PyTorch's order,  i, f, g, o = W_ih x_t + W_hh h_{t-1} + b_ih + b_hh, all sigmoids but g, a tanh:
    c_t = f c_{t-1} + i g;   h_t = o tanh(c_t).
Backward keeps gates and cells and forms the gradient of W_hh in one product over all steps; step by step it would be
rewritten n times. G stands for R runs times 2 directions, h for the hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def bidirectional(x: Tensor, forward: Sequence[Tensor], backward: Sequence[Tensor]) -> Tensor:
    """Hidden states [R, n, 2h] of rows x [R, n, in]; a direction's parameters are W_ih [R, 4h, in], W_hh [R, 4h, h],
    b_ih and b_hh [R, 4h]. The backward direction reads the rows from the last to the first."""
    inputs = [_gate_inputs(x, *forward), _gate_inputs(x, *backward).flip(1)]
    recurrent = torch.cat([forward[1], backward[1]])
    hidden: Tensor = _Recurrence.apply(torch.cat(inputs), recurrent)  # type: ignore[no-untyped-call]
    ahead, behind = hidden.chunk(2)
    return torch.cat([ahead, behind.flip(1)], dim=2)


def _gate_inputs(x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor, recurrent_bias: Tensor) -> Tensor:
    """What the input adds to the gates, [R, n, 4h]."""
    return torch.baddbmm((bias + recurrent_bias)[:, None], x, weight.transpose(1, 2))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, recurrent: Tensor) -> Tensor:
        """Hidden states [G, n, h] from the inputs' share of the gates [G, n, 4h] and W_hh [G, 4h, h]."""
        groups, steps, size = inputs.shape[0], inputs.shape[1], recurrent.shape[2]
        gates = torch.empty_like(inputs)
        cells, hidden = (inputs.new_zeros(groups, steps + 1, size) for _ in range(2))
        for t in range(steps):
            raw = torch.baddbmm(inputs[:, t, None], hidden[:, t, None], recurrent.transpose(1, 2))[:, 0]
            i, f, g, o = raw.chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            gates[:, t] = torch.cat([i, f, g, o], dim=1)
            cells[:, t + 1] = f * cells[:, t] + i * g
            hidden[:, t + 1] = o * cells[:, t + 1].tanh()
        ctx.save_for_backward(gates, cells, hidden, recurrent)
        return hidden[:, 1:].contiguous()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gates, cells, hidden, recurrent = ctx.saved_tensors
        dgates = torch.empty_like(gates)
        dh, dc = torch.zeros_like(cells[:, 0]), torch.zeros_like(cells[:, 0])
        for t in reversed(range(dout.shape[1])):
            i, f, g, o = gates[:, t].chunk(4, dim=1)
            squashed = cells[:, t + 1].tanh()
            dh = dh + dout[:, t]
            dc = dc + dh * o * (1 - squashed**2)
            di, df = dc * g * i * (1 - i), dc * cells[:, t] * f * (1 - f)
            dg, do = dc * i * (1 - g**2), dh * squashed * o * (1 - o)
            dgates[:, t] = torch.cat([di, df, dg, do], dim=1)
            dh = torch.bmm(dgates[:, t, None], recurrent)[:, 0]
            dc = dc * f
        return dgates, torch.bmm(dgates.transpose(1, 2), hidden[:, :-1])
