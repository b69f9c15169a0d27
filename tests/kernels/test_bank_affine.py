"""Scales, shifts and column sums of a bank in C++, and the scaling of rows."""

import pytest
import torch


@pytest.mark.parametrize(("column", "width"), [(0, 1), (5, 63), (2, 127)])
def test_runs(check, rows, dtype, runs, column, width) -> None:
    y, values = rows(runs[-1], column + width + 4, dtype, spare=3), torch.randn(len(runs) - 1, width)
    check("bank_scale_", y, values, column, runs, changed=(0,))
    check("bank_shift_", y, values, column, runs, changed=(0,))
    for before in (None, rows(runs[-1], width, dtype, spare=1)):
        check("bank_column_sums", y, before, column, width, runs)


@pytest.mark.parametrize("threads_used", [1, 2])
def test_threads(check, rows, dtype, threads, threads_used) -> None:
    threads(threads_used)
    check("bank_column_sums", rows(700, 130, dtype), rows(700, 128, dtype), 2, 128, [0, 400, 700])


def test_scale_rows(check, rows, dtype) -> None:
    check("scale_rows", rows(37, 65, dtype, spare=2), torch.randn(37))
