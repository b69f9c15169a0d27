"""Whole steps of the GPU machine's command: a short step as it is launched, and replayed by the stand-in recorder."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftdyno.bench.gpu import step
from peftdyno.bench.gpu.sizes import FULL, TINY
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.optim import AdamW

CPU = torch.device("cpu")


def test_short_rows_are_launched_and_replayed() -> None:
    launched, replayed = step.short_settings(TINY)
    assert (launched.graphs, replayed.graphs) == (False, True) and launched.methods == replayed.methods
    assert step.short(FULL).tokens == 512
    rows = [step._step(s, step.short(TINY), CPU, tiny=True) for s in (launched, replayed)]
    assert all(row["seconds"] > 0 for row in rows) and rows[0]["flops"] == rows[1]["flops"] > 0


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls_of(call: Callable[[], Any]) -> Counter[str]:
    with Calls() as calls:
        call()
    return calls.counts


@pytest.mark.parametrize("name", ["ia3", "bitfit"])
def test_the_frozen_step_computes_no_more_than_a_light_one(name: str) -> None:
    """Neither the gradient of layer 0's input nor one of the embedding, which scales and biases do without."""
    frozen = step.frozen_call(TINY, CPU)
    config = TINY.config()
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    assert frozen().shape == (TINY.tokens, heads * config.head_dim)
    (setting,) = (setting for setting in step.settings(TINY) if setting.name == name)
    decoder, bank = step.model(TINY, setting.methods, CPU, bordered=False)
    pack, optimizer = step.pack_of(TINY, 1, config.vocab_size), AdamW.create(bank)
    light = calls_of(lambda: run_step(decoder, bank, optimizer, [pack], Ledger(Scope(), on=False), 1))
    products = ("linear", "linear_backward", "mm", "index_add", "index_add_", "embedding_dense_backward")
    plain = calls_of(frozen)
    assert {op: plain[op] for op in products} == {op: light[op] for op in products} and plain["linear_backward"] > 0
