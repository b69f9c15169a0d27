"""Kernels are compiled ahead as they are launched: Triton compiles anew for integers and pointers that are multiples of
16, and for integers that are 1, which decides how wide loads are and what lies in shared memory."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from peftdyno.kernels import dispatch, tuning
from peftdyno.kernels.triton import ahead
from peftdyno.kernels.triton.compiled import Compiled
from peftdyno.kernels.triton.tune_subjects import Product, TuneSizes, form_subjects, subjects

CPU = torch.device("cpu")
SIZES = TuneSizes(tokens=20, products=(Product(columns=64, outs=(32, 16)),), rank=16, heads=4, key_heads=2, head_dim=16)
"""Widths are multiples of 16, as in models of any size, and the number of tokens is not."""
COUNTS = {"num_runs", "num_modules", "num_rows", "num_keys", "num_columns", "num_blocks", "count", "rank", "limit"}
COUNTS |= {"out", "first", "last", "P", "P0", "turns", "num_parts"}
"""Integers of a pack or a method: they may be anything, so nothing is assumed of them."""

Launches = dict[str, list[dict[str, Any]]]


def name_of(function: Any) -> str:
    """Of a kernel, also of the copy that the interpreter runs."""
    return f"{function.__module__}.{function.__name__}"


@pytest.fixture(scope="module")
def launched() -> Launches:
    """Kernel -> arguments of each of its launches."""
    found: Launches = defaultdict(list)
    call = GridExecutor.__call__

    def record(self: Any, *args: Any, **options: Any) -> None:
        found[name_of(self.fn)].append(dict(zip(self.arg_names, args, strict=False)) | options)
        call(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", record)
        patch.setattr(dispatch, "_choice", "triton")
        for subject in subjects(SIZES, CPU):
            subject.call()
        for choice in form_subjects(SIZES, CPU):
            for form in choice.forms:
                with tuning.trial_form(choice.operator, form):
                    choice.call()
    return found


def cases(launched: Launches) -> list[tuple[Compiled, list[dict[str, Any]]]]:
    """Each variant with the launches that have its flags."""
    found = []
    for case in ahead.cases():
        flags = {name: value for name, value in case.constants.items() if isinstance(value, bool)}
        same = [a for a in launched[name_of(case.kernel.fn)] if all(a[name] == value for name, value in flags.items())]
        found += [(case, same)] if same else []
    assert len({name_of(case.kernel.fn) for case, _ in found}) > 14
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are watched in the interpreter")
def test_integers_are_what_launches_pass(launched: Launches) -> None:
    for case, calls in cases(launched):
        integers = {n for n, kind in case.signature.items() if kind == "i32"} - COUNTS
        whole = {n for n in integers if all(a[n] % 16 == 0 for a in calls) and n not in case.constants}
        ones = {n for n in integers if all(a[n] == 1 for a in calls)}
        assert case.aligned - set(case.constants) == whole, case.name
        assert {n for n in integers if case.constants.get(n) == 1} == ones, case.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are watched in the interpreter")
def test_pointers_are_multiples_of_16(launched: Launches) -> None:
    for case, calls in cases(launched):
        pointers = {n for n, kind in case.signature.items() if kind.startswith("*")}
        names = pointers - {"scaling"}  # of which values are loaded one at a time
        assert not [n for n in names if any(a[n].data_ptr() % 16 for a in calls)], case.name
