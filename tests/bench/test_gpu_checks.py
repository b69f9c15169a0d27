"""Checks of what no measured step calls: in the interpreter they take the path they are named for, and pass."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from peftdyno.bench.gpu import checks
from peftdyno.bench.gpu.cases import Case, Draw, all_cases
from peftdyno.bench.gpu.other_cases import ByLibrary, Decoding, other_cases
from peftdyno.bench.gpu.sizes import FULL, TINY
from peftdyno.kernels import dispatch, tuning
from peftdyno.kernels.triton import attention as forward_kernels
from peftdyno.kernels.triton import attention_library as library
from peftdyno.kernels.triton import lora_gemm, output_gradient

CPU = torch.device("cpu")
CASES = list(enumerate(other_cases(TINY, CPU)))


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    dispatch.use("triton")
    yield
    dispatch.use("auto")


def passes(case: Case, dtype: torch.dtype) -> None:
    row = checks._row(case, dtype, TINY, 0)
    assert row["ok"], (case.name, dtype, row)


def launches(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Names of the calls of a function."""
    made: list[str] = []
    plain = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (made.append(name), plain(*a, **k))[1])
    return made


def test_names_are_different() -> None:
    names = [case.name for case in [*all_cases(FULL, CPU), *other_cases(FULL, CPU)]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("index", "case"), CASES, ids=[case.name for _, case in CASES])
def test_other_calls_are_right(index: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = [launches(monkeypatch, lora_gemm, name) for name in ("product", "product_backward")]
    together = launches(monkeypatch, output_gradient, "together")
    passes(case, torch.float16 if case.form or index % 2 else torch.float32)
    taken = "fused" if any(fused) else "together" if together else ""
    assert taken == case.form, "a form that gave way would have checked another"


@pytest.mark.parametrize("window", [0, 10])
def test_decoding_in_parts_is_right(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_kernels, "PIECE", 16)
    monkeypatch.setattr(forward_kernels, "_piece", lambda *_: 16)
    made = launches(monkeypatch, forward_kernels, "query_tiles")
    passes(Case("attention", "decoding", Decoding(Draw(TINY, CPU), window).forward), torch.float16)
    assert made


def test_decoding_on_a_gpu_is_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few processors as the smallest that is served has, the keys of the check's contexts are divided."""
    segments, chain = Decoding(Draw(FULL, CPU)).tables(checks._tokens(FULL))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=108))
    key_heads = FULL.config().num_key_value_heads
    assert forward_kernels._piece(len(segments), key_heads, torch.device("cuda"), int(chain[:, 1].max()))


def test_a_library_that_gives_way_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "runnable", lambda operator, device: tuning.FORMS[operator])
    cases = [case for case in other_cases(TINY, CPU) if isinstance(case, ByLibrary)]
    assert {(case.operator, case.form) for case in cases} == {
        ("attention", "varlen"), ("attention", "flash-attn"), ("attention_backward", "varlen"),
    }  # fmt: skip
    served: list[str] = []

    def stand_in(call: library.Call, q: Any, *_: Any) -> Any:
        served.append(call.form)
        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])

    def gradients(call: library.Call, dout: Any, out: Any, q: Any, k: Any, v: Any, lse: Any) -> Any:
        served.append(call.form)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    monkeypatch.setattr(library, "torch_forward", stand_in)
    monkeypatch.setattr(library, "flash_attn_forward", stand_in)
    monkeypatch.setattr(library, "torch_backward", gradients)
    for case in cases:
        case.call(*case.make(torch.float16, 12))
    assert served == [case.form for case in cases]
    with pytest.raises(AssertionError, match="does not serve"):
        cases[0].call(*cases[0].make(torch.float32, 12))
