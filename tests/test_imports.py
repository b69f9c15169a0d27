"""Importing is cheap: the package leaves heavy libraries alone until they are needed, `--help` even torch."""

import importlib.util
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("transformers", "datasets", "pandas", "peft", "sklearn", "gguf", "huggingface_hub")
HELP_SECONDS = 1.0


def modules_after(source: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter once it has run `source`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    child = subprocess.run(
        [sys.executable, "-P", "-c", f"{source}\n{report}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(child.stdout.splitlines()[-1].split())


def test_package_import_is_light() -> None:
    loaded = modules_after("import peftdyno.engine, peftdyno.kernels, peftdyno.bench")
    assert "peftdyno" in loaded and not loaded & set(HEAVY)


def console_script() -> str:
    if importlib.util.find_spec("peftdyno.bench.cli") is None:
        pytest.skip("the command line does not exist yet")
    return shutil.which("peftdyno", path=str(Path(sys.executable).parent))


def test_help_leaves_torch_alone() -> None:
    line = [sys.executable, "-X", "importtime", console_script(), "--help"]
    child = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0 and "Usage" in child.stdout
    loaded = {row.rpartition("|")[2].strip() for row in child.stderr.splitlines()}
    assert "peftdyno.bench.cli" in loaded and not loaded & {"torch", "numpy", *HEAVY}


def test_help_answers_under_a_second() -> None:
    """Processor time, best of three: the clock on the wall would measure the neighbours as well."""
    line, seconds = [console_script(), "--help"], []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(line, capture_output=True, timeout=120, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < HELP_SECONDS
