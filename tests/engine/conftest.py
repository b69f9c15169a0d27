"""What tests of the engine share: one thread, for tiny products are slower on several, and tiny models."""

from collections.abc import Callable

import pytest

from .banks import TinyModel, tiny_model


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """Tiny products are slower on several threads."""
    threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model of the Llama family."""
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model of the Gemma family."""
    return tiny_model("gemma3", tmp_path_factory.mktemp("gemma"))
