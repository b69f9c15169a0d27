"""Python's garbage collector beside loops that make and drop many objects each step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_objects() -> Iterator[None]:
    """Within it, the collector does not walk through what was there before.

    A step of training makes thousands of graph nodes and views, so the collector runs many times a step, and now and
    then over every module, class and function that was ever loaded.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
