"""Fixtures of the command line: a tiny model and data set made once, and a shell around them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("tiny_jobs", Path(__file__).parent / "tiny_jobs.py")
tiny_jobs = importlib.util.module_from_spec(_SPEC)
sys.modules["tiny_jobs"] = tiny_jobs
_SPEC.loader.exec_module(tiny_jobs)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return tiny_jobs.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with sst2."""
    return tiny_jobs.write_sst2(tmp_path_factory.mktemp("data"))


@pytest.fixture
def shell(tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Command lines in this process."""
    return tiny_jobs.Shell(tiny_model, tiny_data, capsys, monkeypatch)
