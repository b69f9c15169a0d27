"""Run kernels on the GPU where there is one, else in Triton's interpreter; skip where Triton is not installed."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
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
