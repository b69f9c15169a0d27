"""Calls recorded operator by operator: what is repeated follows its inputs, views and writes in place included."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftdyno.engine.tape import TapeRecorder, unavailable
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.lora_linear import BACKWARD, FORWARD

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")


def repeats(compute: Callable[[Tensor], Tensor], *shape: int) -> None:
    """A recording over one input gives, over two others, what the call gives, in the same memory."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    again = TapeRecorder().record(lambda: compute(x))
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn(shape))
        expected = compute(x).detach().clone()
        found = again()
        assert torch.equal(found, expected)
        assert found.data_ptr() == again().data_ptr()


def test_views_of_what_was_made() -> None:
    def compute(x: Tensor) -> Tensor:
        wide = torch.cat([x, 2 * x], 1)
        left, right = wide.split((3, 5), 1)
        return (left.t() @ right + wide[1, 2]).t()[1:]

    repeats(compute, 6, 4)


def test_writes_in_place() -> None:
    def compute(x: Tensor) -> Tensor:
        total = torch.zeros(3)
        total.add_(x.sum(0))
        total[1:].mul_(2)
        own = x * 3
        own.view(-1)[:2].neg_()
        return total + own[0]

    repeats(compute, 4, 3)


def test_a_result_that_is_a_view_or_comes_from_outside() -> None:
    outside = torch.randn(3)
    repeats(lambda x: (x * 2)[1:, ::2], 4, 5)
    repeats(lambda _: outside, 2)


def test_gradients() -> None:
    weight = torch.randn(5, 4)

    def compute(x: Tensor) -> Tensor:
        leaf = (x * 1.0).detach().requires_grad_()
        loss = torch.nn.functional.silu(leaf @ weight.t()).pow(2).sum() + leaf[0].sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    repeats(compute, 3, 4)


def test_results_that_are_not_there() -> None:
    """A norm's backward pass gives the gradient of its input alone."""
    weight, bias = torch.rand(6), torch.rand(6)

    def compute(x: Tensor) -> Tensor:
        leaf = (x * 1.0).detach().requires_grad_()
        torch.nn.functional.layer_norm(leaf, (6,), weight, bias).square().sum().backward()
        return leaf.grad  # type: ignore[return-value]

    repeats(compute, 3, 6)


class _Low(torch.autograd.Function):
    """A low-rank product, whose operator gives lists of tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, u = FORWARD(
            x, weight, None, [a.detach()], [b.detach()], [2.0], [0, 4], [0, len(x)], 0.0, None, None, 0, 0, 0
        )
        ctx.save_for_backward(x, u, weight, a, b)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        x, u, weight, a, b = ctx.saved_tensors
        places = [2.0], [0, 4], [0, len(x)], 0.0, None, None, 0, True
        dx, (da,), (db,) = BACKWARD(dy, x, u, weight, [a], [b], *places)
        return dx, None, da, db


def test_operators_of_ours() -> None:
    weight, a, b = torch.randn(4, 6), torch.randn(1, 2, 6), torch.randn(1, 4, 2)

    def compute(x: Tensor) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        apply(_Low, leaves[0], weight, *leaves[1:]).square().sum().backward()
        return torch.cat([leaf.grad.flatten() for leaf in leaves])  # type: ignore[union-attr]

    repeats(compute, 5, 6)


def test_a_tensor_from_outside_where_one_of_the_tape_was() -> None:
    """The allocator gives the same memory again and Python the same address."""

    def compute(x: Tensor) -> Tensor:
        total = x * 0
        for _ in range(50):
            made = x + 1
            del made
            total = total + torch.tensor([1.0, 2.0, 3.0]) * x
        return total

    repeats(compute, 3)


def test_recording_does_not_import_the_compiler() -> None:
    """It would take longer than a short answer."""
    program = (
        "import sys, torch; from peftdyno.engine.tape import TapeRecorder; x = torch.ones(2);"
        "TapeRecorder().record(lambda: x + 1)(); print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: torch.equal(x, x)])
def test_values_read_on_the_host_are_refused(read: Callable[[Tensor], object]) -> None:
    x = torch.randn(3)

    def compute() -> Tensor:
        read(x)
        return x + 1

    with pytest.raises(RuntimeError, match="reads a value on the host"):
        TapeRecorder().record(compute)


def test_what_nobody_reads_again_is_freed() -> None:
    size = 1 << 20
    x = torch.randn(size)

    def compute() -> Tensor:
        y = x
        for _ in range(8):
            y = y + 1
        return y

    again = TapeRecorder().record(compute)
    again()
    torch.ops.peftdyno_cpu.memory_start()
    again()
    peak, *_ = torch.ops.peftdyno_cpu.memory_stop()
    assert 4 * size < peak <= 3 * 4 * size, peak
