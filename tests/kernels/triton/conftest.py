"""Run kernels on the GPU where there is one, else in Triton's interpreter; not where Triton does not exist."""

import sys
from collections.abc import Iterator

import pytest
import torch

from peftdyno.kernels import dispatch

if sys.platform != "linux":  # there it is one of the packages for development: its tests fail without it
    collect_ignore_glob = ["test_*.py"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return DEVICE


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Dtypes that the interpreter computes correctly."""
    return request.param


@pytest.fixture(autouse=True)
def poisoned(poison: None) -> None:
    """In every test."""


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """The explicit choice of Triton's kernels, for one test."""
    before = dispatch.current()
    dispatch.use("triton")
    yield
    dispatch.use(before)
