"""How operators are called: through torch's operator where a dispatch mode watches, directly where none does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftdyno.kernels import cpu
from peftdyno.kernels.library import PRIMITIVES, watched


class Names(TorchDispatchMode):
    """Notes the names of the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_watching_mode_sees_the_operator() -> None:
    x, weight = torch.randn(3, 32), torch.randn(5, 32)
    assert not watched()
    plain = PRIMITIVES["linear"](x, weight, None, 0)
    with Names() as names:
        assert watched()
        seen = PRIMITIVES["linear"](x, weight, None, 0)
    assert names.seen == ["peftdyno::linear"]
    assert torch.equal(plain, seen)


def test_meta_tensors_are_given_shapes() -> None:
    x, weight = torch.empty(3, 32, device="meta"), torch.empty(5, 32, device="meta")
    y = PRIMITIVES["linear"](x, weight, None, 8)
    assert (y.shape, y.stride(), y.device.type) == ((3, 5), (13, 1), "meta")


@pytest.mark.skipif(not cpu.AVAILABLE, reason="needs the C++ extension")
@pytest.mark.parametrize("name", ["linear", "lora_linear"])
def test_plain_functions_refuse_other_devices(name) -> None:
    x, weight = torch.empty(3, 32), torch.empty(5, 32, device="meta")
    factors = [torch.empty(1, 4, 32, device="meta")], [torch.empty(1, 5, 4, device="meta")]
    rest = (None, 0) if name == "linear" else (None, *factors, [1.0], [0, 5], [0, 3], 0.0, None, None, 0, 0, 0)
    with pytest.raises(RuntimeError, match="on the CPU, not on meta"):
        PRIMITIVES[name].implementations["cpu"](x, weight, *rest)


@pytest.mark.skipif(not cpu.AVAILABLE, reason="needs the C++ extension")
def test_plain_functions_are_torch_operators_too() -> None:
    x, weight = torch.randn(3, 32), torch.randn(5, 32)
    by_torch = torch.ops.peftdyno_cpu.linear(x, weight, None, 0)
    assert torch.equal(PRIMITIVES["linear"].implementations["cpu"](x, weight, None, 0), by_torch)
