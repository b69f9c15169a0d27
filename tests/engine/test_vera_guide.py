"""The example of docs/guides/add-a-method.md: its file and its test, taken from the page and run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.errors import UserError
from peftdyno.engine.merge import merge_adapter

from . import banks, test_bank
from .banks import TinyModel, pack_of, random_sequences, relative, shake, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-method.md"
NAMES = {
    "engine/adapters/vera.py": "peftdyno.engine.adapters.vera",
    "tests/engine/test_vera.py": f"{__package__}.test_vera",
}


def blocks() -> dict[str, str]:
    """Path in a heading -> the Python block below it."""
    found = re.findall(r"^## The \w+: `(.+?)`$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]) -> dict[str, ModuleType]:
    """The page's modules under the names they would have, and VeRA in the registry as its file would put it."""
    threads(1)
    modules = {}
    for path, source in blocks().items():
        file = tmp_path / Path(path).name
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(NAMES[path], file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, NAMES[path], module)
        spec.loader.exec_module(module)
        modules[path] = module
    method = modules["engine/adapters/vera.py"].VeRA
    monkeypatch.setitem(METHODS, method.name, method)
    monkeypatch.setitem(banks.FORMS, method.name, (method.name, {"rank": 4}))
    return modules


def test_the_page_holds_one_file_and_one_test() -> None:
    assert set(blocks()) == set(NAMES)


def test_the_pages_test_passes(example: dict[str, ModuleType], tmp_path: Path) -> None:
    module = example["tests/engine/test_vera.py"]
    tests = {name: getattr(module, name) for name in dir(module) if name.startswith("test_")}
    assert len(tests) == 2
    for name, test in tests.items():
        test(*([tmp_path / name] if "tmp_path" in test.__annotations__ else []))


def test_the_tests_of_every_method_pass(
    example: dict[str, ModuleType], llama: TinyModel, gemma: TinyModel, request: pytest.FixtureRequest
) -> None:
    test_bank.test_starts_as_the_base_model("vera", llama, gemma)
    test_bank.test_runs_together_equal_runs_alone("vera", llama)
    test_bank.test_micro_batches_add_up("vera", gemma)
    test_bank.test_a_shared_prefix_equals_repeated_ones("vera", gemma)
    test_bank.test_generation_with_a_cache_equals_one_without("vera", "llama", request)
    with banks.float64_kernels():
        test_bank.test_gradients_equal_finite_differences("vera")


def test_it_merges_and_is_stored(example: dict[str, ModuleType], tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    bank = shake(model.bank(METHODS["vera"](rank=4)))
    save_adapter(bank, 0, tmp_path / "adapter", "base", model.family)
    read = bank_from_adapters([tmp_path / "adapter"], model.config, model.decoder.weights, model.family)
    before = logits(model, read)
    merge_adapter(model.config, model.decoder.weights, model.family, bank, 0)
    assert relative(logits(model, model.bank(METHODS["vera"](rank=4))), before) <= 1e-5


def logits(model: TinyModel, bank: AdapterBank):
    bank.begin(0, training=False)
    return model.decoder.logits(pack_of(bank, random_sequences([9, 5])), bank).detach()


def test_bad_settings_are_named(example: dict[str, ModuleType]) -> None:
    for settings, message in (({"rank": 0}, "rank 0"), ({"target_modules": ("q",)}, "q_proj")):
        with pytest.raises(UserError, match=message):
            METHODS["vera"](**settings)


def test_the_example_keeps_the_house_style(example: dict[str, ModuleType], tmp_path: Path) -> None:
    files = [str(tmp_path / Path(path).name) for path in NAMES]
    config = str(PAGE.parents[2] / "pyproject.toml")
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", config, *files], capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
