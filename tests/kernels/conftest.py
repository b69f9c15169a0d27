"""Every instruction set, poisoned memory, and the rule by which a C++ kernel is judged against its reference."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from peftdyno.kernels import (  # each import registers an operator
    adamw,  # noqa: F401
    attention,  # noqa: F401
    bank_affine,  # noqa: F401
    cpu,
    glu,  # noqa: F401
    label_loss,  # noqa: F401
    linear,  # noqa: F401
    lora_linear,  # noqa: F401
    rms_norm,  # noqa: F401
    rotary,  # noqa: F401
)
from peftdyno.kernels.library import PRIMITIVES, with_spare
from peftdyno.kernels.oracle import excess, in_float64, neighbours

RUNS = {"one": [0, 63], "single-token": [0, 1], "empty-first": [0, 0, 30, 65], "empty-inside": [0, 5, 5, 126, 127]}
"""Rows of the runs: one run, one row, empty runs at the start and between others."""


@pytest.fixture(params=cpu.INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has, put in force for one test; one thread unless it asks for more."""
    if not cpu.AVAILABLE:
        pytest.skip("the C++ kernels are not built")
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    before, threads = cpu.instruction_set(), torch.get_num_threads()
    cpu.use_instruction_set(request.param)
    torch.set_num_threads(1)
    yield request.param
    cpu.use_instruction_set(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both dtypes of activations."""
    return request.param


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def runs(request: pytest.FixtureRequest) -> list[int]:
    """Offsets of the runs' rows."""
    return request.param


@pytest.fixture
def rows() -> Callable[..., Tensor]:
    """`rows(n, columns, dtype, spare=0)`: random rows with other elements between them."""

    def make(n: int, columns: int, dtype: torch.dtype, spare: int = 0) -> Tensor:
        out = with_spare(n, columns, spare, torch.empty(0, dtype=dtype))
        return out.copy_(torch.randn(n, columns))

    return make


def _results(function: Callable[..., Any], arguments: tuple[Any, ...], changed: tuple[int, ...]) -> Any:
    """What the operator returns, or copies of the arguments that it changes."""
    if not changed:
        return function(*arguments)
    copies = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a) if i in changed else a
        for i, a in enumerate(arguments)
    ]
    function(*copies)
    return [copies[i] for i in changed]


@pytest.fixture
def check(isa: str, poison: None) -> Callable[..., Any]:
    """`check(name, *arguments, changed=())`: the C++ operator stays within the budget; gives its results."""

    def run(name: str, *arguments: Any, changed: tuple[int, ...] = ()) -> Any:
        primitive = PRIMITIVES[name]
        reference = primitive.implementations["reference"]

        def plain(*inner: Any) -> Any:
            return _results(reference, inner, changed)

        result = _results(primitive.implementations["cpu"], arguments, changed)
        judged = result, plain(*arguments), in_float64(plain, arguments)
        lines = excess(name, *judged) and excess(name, *judged, neighbours(plain, arguments))
        assert not lines, lines
        return result

    return run
