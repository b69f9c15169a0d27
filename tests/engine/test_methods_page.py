"""docs/methods.md: as the methods are now, with the published counts, and every method's equation and source."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from peftdyno.bench.published.source import published
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.method import Method

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("methods_page", FOLDER / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(section: str) -> list[list[str]]:
    """Cells of the rows of a section's table in the written page, head first."""
    text = (FOLDER / "methods.md").read_text(encoding="utf-8")
    lines = text.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [table[0], *table[2:]]


def test_the_page_is_current(methods: ModuleType) -> None:
    assert (FOLDER / "methods.md").read_text(encoding="utf-8") == methods.page(), "run `python docs/methods.py`"


@pytest.mark.parametrize("name", published().methods)
def test_published_counts_appear(name: str) -> None:
    head, *body = rows("Trainable parameters")
    column = next(i for i, cell in enumerate(head) if "Llama-3-8B" in cell)
    shown = {row[column] for row in body if row[0].split()[0] == name}
    assert f"{published().parameters[name]:,}" in shown


def test_seven_methods_are_published() -> None:
    assert len(set(published().methods) & METHODS.keys()) == 7


@pytest.mark.parametrize("name", METHODS)
def test_every_method_states_an_equation_and_a_paper(name: str, methods: ModuleType) -> None:
    text = methods.summary(METHODS[name])
    assert " = " in text
    assert re.search(r"\b(19|20)\d\d\b.*\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", text)


@pytest.mark.parametrize("name", METHODS)
def test_a_reason_stands_where_there_is_no_merge(name: str, methods: ModuleType) -> None:
    cls = METHODS[name]
    shown = methods.mergeable(cls())
    assert shown.startswith("no: ") == (cls.merge is Method.merge)
    assert shown.startswith("yes") or cls.unmergeable in methods.refusal(cls(), "llama-3-8b")


def test_a_method_without_a_known_hook_is_refused(methods: ModuleType) -> None:
    with pytest.raises(ValueError, match="overrides none of"):
        methods.acts_on(Unhooked())


class Unhooked(Method):
    """A method that acts nowhere."""

    name = "unhooked"
