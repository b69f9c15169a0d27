"""DispatchMode: what sees every operator; the base of the modes that count, that follow memory and that record."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that PyTorch's compiler is not told to keep away from: telling it imports the whole compiler,
    which takes seconds, and nothing here is compiled."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
