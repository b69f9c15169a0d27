"""Where a model is loaded to."""

import pytest
import torch

from peftdyno.bench.base_model import choose_device
from peftdyno.engine.errors import UserError


def test_a_numbered_card_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, streams and events go to the current card, wherever their tensors lie."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    with pytest.raises(UserError, match="--device 'cuda:2': PyTorch sees 2 CUDA devices"):
        choose_device("cuda:2")
    assert [choose_device(name).type for name in ("cuda", "auto", "cpu")] == ["cuda", "cuda", "cpu"]
    assert len(current) == 1, "the current card stays where none is named"
