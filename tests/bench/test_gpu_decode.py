"""Decoding rates of the GPU machine's command."""

from types import SimpleNamespace
from typing import Any

import pytest

from peftdyno.bench.gpu import decode


def test_a_recording_that_takes_long_once_does_not_move_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes 2 s here; recordings take 1 s, but for two of them, one of a short and one of a long generation."""
    clock, recordings = [0.0], iter([1.0, 1.0, 40.0, 9.0] + [1.0] * 20)

    def generate(*_: Any, max_new_tokens: int, **__: Any) -> None:
        clock[0] += next(recordings) + 2.0 * max_new_tokens

    monkeypatch.setattr(decode, "generate", generate)
    monkeypatch.setattr(decode, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model: Any = None
    assert decode._seconds_a_token(model, model, [], 10, "on") == pytest.approx(2.0)
