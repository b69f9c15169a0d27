"""A call recorded at a few sizes, repeated at others: what its integers mean, and when that is not known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftdyno.engine.sized_tape import SizedTape
from peftdyno.engine.tape import Heard, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason="the C++ kernels, which replay tapes, are not built")
Compute = Callable[[Tensor, int], Tensor]


def heard(compute: Compute, rows: int, cut: int) -> Heard:
    x = torch.randn(rows, 4)
    return Heard([x]).listen(lambda: compute(x, cut).sum())


def sizes_of(rows: int, cut: int) -> tuple[int, int, int]:
    """Rows, where they are cut, and those behind."""
    return rows, cut, rows - cut


def recorded(compute: Compute, *cuts: tuple[int, int]) -> SizedTape:
    """Recorded at some pairs of rows and where they are cut."""
    tape = SizedTape(heard(compute, *cuts[0]), sizes_of(*cuts[0]))
    for cut in cuts[1:]:
        assert tape.learn(heard(compute, *cut), sizes_of(*cut))
    return tape


def cut_apart(x: Tensor, cut: int) -> Tensor:
    """Views whose offsets are multiples of the cut, sizes among the arguments, and a width that is always 4."""
    y = x * 2
    first, second = y[:cut], y[cut:]
    return torch.cat([second.new_zeros(cut, 4) + first, second.cumsum(0)], 0)


def test_other_sizes() -> None:
    tape = recorded(cut_apart, (7, 3), (10, 5))
    for rows, cut in ((12, 4), (4, 1), (30, 17), (7, 3)):
        sizes, x = sizes_of(rows, cut), torch.randn(rows, 4)
        assert tape.fits(sizes)
        assert torch.equal(tape.at(sizes, [x])(), cut_apart(x, cut).sum())


def test_what_is_not_known_does_not_fit() -> None:
    """4 rows and a width of 4, and a cut that was always the same."""
    tape = recorded(cut_apart, (4, 3))
    assert tape.fits(sizes_of(4, 3)) and not tape.fits(sizes_of(8, 3))
    tape = recorded(cut_apart, (7, 3), (9, 3))
    assert tape.fits(sizes_of(11, 3)) and not tape.fits(sizes_of(11, 5))
    assert tape.learn(heard(cut_apart, 8, 5), sizes_of(8, 5)) and tape.fits(sizes_of(11, 6))


def test_sizes_that_were_the_same_each_time() -> None:
    tape = recorded(cut_apart, (6, 6), (8, 8))
    assert tape.fits(sizes_of(9, 9)) and not tape.fits(sizes_of(9, 4))


def test_another_call_is_not_learned() -> None:
    tape = recorded(cut_apart, (7, 3))
    assert not tape.learn(heard(lambda x, cut: cut_apart(x, cut).neg(), 9, 5), sizes_of(9, 5))
    scales = iter((2.0, 3.0))
    tape = recorded(lambda x, _: x * next(scales), (7, 3))
    assert not tape.learn(heard(lambda x, _: x * next(scales), 9, 5), sizes_of(9, 5)), "a number that is no size"
    constants = iter(torch.ones(2, 1))
    tape = recorded(lambda x, _: x * next(constants), (7, 3))
    assert not tape.learn(heard(lambda x, _: x * next(constants), 9, 5), sizes_of(9, 5)), "another tensor from outside"


def test_an_integer_that_is_no_size_is_refused() -> None:
    chosen = iter((2, 4))
    tape = recorded(lambda x, _: x.narrow(0, 0, next(chosen)).clone() * 2, (7, 3))
    with pytest.raises(RuntimeError, match="depends on the batch, and not by its sizes alone"):
        tape.learn(heard(lambda x, _: x.narrow(0, 0, next(chosen)).clone() * 2, 9, 5), sizes_of(9, 5))


def test_given_tensors_are_not_kept() -> None:
    """What was given last goes when the call is over."""
    tape = recorded(cut_apart, (7, 3), (10, 5))
    torch.ops.peftdyno_cpu.memory_start()
    tape.at(sizes_of(12, 4), [torch.randn(12, 4)])()
    _, live, _ = torch.ops.peftdyno_cpu.memory_stop()
    assert live == 0
