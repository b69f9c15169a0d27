"""Time of every operator on the CPU: ours, its PyTorch reference, and that compiled; rates by its cost formula.

    pytest bench/micro --benchmark-only --benchmark-group-by=param:case --benchmark-json=FILE
PEFTDYNO_MICRO=full takes the shapes of an 8B model in bf16 instead of small ones in fp32.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from peftdyno.bench.gpu.cases import Case, all_cases
from peftdyno.bench.gpu.checks import results
from peftdyno.bench.gpu.sizes import FULL, TINY
from peftdyno.kernels.library import COSTS, PRIMITIVES

pytest.importorskip("pytest_benchmark", reason="microbenchmarks need pytest-benchmark")
SMALL = replace(
    TINY,
    fields={
        **FULL.fields,
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    length=128,
    rank=16,
    labels_checked=64,
)
WHOLE = os.environ.get("PEFTDYNO_MICRO") == "full"
SIZES, DTYPE = (FULL, torch.bfloat16) if WHOLE else (SMALL, torch.float32)
CASES = {case.name: case for case in all_cases(SIZES, torch.device("cpu"))}
KINDS = ("cpu", "reference", "compile")


def implementation(case: Case, kind: str) -> Any:
    """The callable to time; skips where there is none of the kind."""
    forms = PRIMITIVES[case.operator].implementations
    if kind == "compile":
        if "compile" not in case.against:
            pytest.skip("not compared with torch.compile")
        return torch.compile(forms["reference"])
    if kind not in forms:
        pytest.skip(f"{case.operator} has no '{kind}' implementation here")
    return forms[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_operator(case: str, kind: str, benchmark: Any) -> None:
    """One operator at one shape."""
    torch.manual_seed(0)
    chosen = CASES[case]
    arguments = chosen.make(DTYPE, SIZES.tokens)
    function = implementation(chosen, kind)
    benchmark.pedantic(results(function, ()), arguments, rounds=5, warmup_rounds=1)
    if benchmark.stats is None:
        return
    cost, seconds = COSTS[chosen.operator](*arguments), benchmark.stats.stats.median
    flops, moved = cost.base.matrix + cost.adapter.matrix, cost.base.bytes + cost.adapter.bytes
    benchmark.extra_info |= {"tflops": flops / seconds / 1e12, "gbytes_per_second": moved / seconds / 1e9}
    benchmark.extra_info |= {"dtype": str(DTYPE), "threads": torch.get_num_threads(), "torch": torch.__version__}
