"""A training step through the whole engine: Triton's kernels give the reference's losses and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftdyno.engine import pack_padding, step_graphs
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.border import lay_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.families import config_from_hf
from peftdyno.engine.graphs import EagerRecorder
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.engine.train import forward_backward
from peftdyno.engine.weights import random_weights
from peftdyno.kernels import dispatch, replay, tuning
from peftdyno.kernels.low_rank_input import Down
from peftdyno.kernels.triton import attention_tables, low_rank, row_chunks

FIELDS = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 4, "dropout": 0.2, "target_modules": ("q_proj", "v_proj", "down_proj")},
    "ia3": {},
    "prefix-tuning": {"num_virtual_tokens": 3},
}


def gradients(name: str, kernels: str, device: torch.device, bordered: bool) -> tuple[Tensor, Tensor]:
    """Losses and all gradients of one step of two runs behind a shared beginning."""
    config = config_from_hf(FIELDS)
    weights = random_weights(config, torch.float32, device=device)
    bank = AdapterBank.create(config, [METHODS[name](**METHOD_OPTIONS[name])] * 2, [1, 2], weights)
    with torch.no_grad():
        bank.flat.add_(0.1 * torch.randn(bank.flat.shape, generator=torch.Generator().manual_seed(1)).to(device))
    if bordered:
        lay_borders(weights, bank)
    sequences = [
        Sequence(tokens=(1, 7, 9, *range(10 + run, 14 + 3 * i)), num_prompt=2, run=run, ordinal=i)
        for run in range(2)
        for i in range(2)
    ]
    pack = build_pack(sequences, num_runs=2, share_prefix=True, root=bank.root).to(device)
    before = dispatch.current()
    dispatch.use(kernels)
    try:
        bank.zero_grad()
        bank.begin(3, training=True)
        losses = Decoder(config, weights).losses(pack, bank)
        losses.sum().backward()
        bank.finish()
    finally:
        dispatch.use(before)
    return losses.detach(), bank.gradient.clone()


@pytest.mark.parametrize(
    ("name", "bordered"),
    [("lora", False), ("lora", True), ("ia3", False), ("prefix-tuning", False), ("full", False)],
)
def test_step_equals_the_reference(name: str, bordered: bool, device: torch.device) -> None:
    losses, found = gradients(name, "triton", device, bordered)
    expected_losses, expected = gradients(name, "reference", device, False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    assert bool((expected.norm(dim=1) > 0).all()), "every run learns"


class _Added(TorchDispatchMode):
    """The indices of all sums of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("index_add", "index_add_", "index_put_", "scatter_add_"):
            self.indices += [t for t in args if isinstance(t, Tensor) and t.dtype == torch.int64]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_gradients_are_summed_in_an_order(name: str, device: torch.device) -> None:
    """PyTorch adds rows on a GPU with atomics: where an index names a row more than once, in any order.

    Sequences behind a shared beginning have labels at the same rows, and tokens in common after it."""
    with _Added() as added:
        gradients(name, "triton", device, False)
    assert added.indices, "rows are picked for the labels"
    assert all(len(index.unique()) == len(index) for index in added.indices)


def test_producers_that_make_the_low_rank_input(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm and the activation before an adapted product multiply by A: two layers, q and v together, down alone."""
    made, plain = [], Down.arguments
    monkeypatch.setattr(Down, "arguments", lambda self: (made.append(len(self.a)), plain(self))[1])
    with tuning.trial_form("rms_norm_down", "together"), tuning.trial_form("glu_down", "together"):
        losses, found = gradients("lora", "triton", device, True)
    assert made == [2, 1, 2, 1]
    expected_losses, expected = gradients("lora", "reference", device, False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


SHAPES = [[(0, 3), (0, 6), (1, 2), (1, 3)], [(0, 8), (0, 1), (1, 4), (1, 1)]]
"""Two packs of one size: (run, tokens of its own) of sequences that begin alike."""


def forest(shape: list[tuple[int, int]]) -> Pack:
    sequences = [
        Sequence(tokens=(1, 7, *range(9 + i, 10 + i + n)), num_prompt=2, run=run, ordinal=i)
        for i, (run, n) in enumerate(shape)
    ]
    return build_pack(sequences, num_runs=2, share_prefix=True)


def test_a_recorded_step_computes_another_pack(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packs at two steps by one recording, whose work lists and keys are filled anew, in bordered products.

    The recorder stands in for CUDA graphs: it runs the same kernels on the same buffers again."""
    for name in ("LEAST_ROWS", "LEAST_LABELS"):
        monkeypatch.setattr(pack_padding, name, 1)
    monkeypatch.setattr(step_graphs, "NUM_CHECKED", 1)
    config = config_from_hf(FIELDS | {"num_hidden_layers": 1})
    weights = random_weights(config, torch.float32, device=device)
    bank = AdapterBank.create(config, [METHODS["lora"](**METHOD_OPTIONS["lora"])] * 2, [1, 2], weights)
    with torch.no_grad():
        bank.flat.add_(0.1 * torch.randn(bank.flat.shape, generator=torch.Generator().manual_seed(1)).to(device))
    lay_borders(weights, bank)
    decoder, ledger, before = Decoder(config, weights), Ledger(Scope(), on=False), dispatch.current()
    steps, found = step_graphs.StepGraphs(decoder, bank, recorder=EagerRecorder()), []
    dispatch.use("triton")
    try:
        for i, shape in enumerate(SHAPES):
            losses, _ = forward_backward(decoder, bank, [forest(shape)], i, ledger, steps)
            found.append((losses, bank.gradient.clone()))
        (recording,) = steps.recordings.values()
        for module in (row_chunks, low_rank, attention_tables):
            monkeypatch.setattr(module, "upload", None)
        with replay.recording(recording.tables):  # what is recorded makes no table
            steps.run(recording.pack)
    finally:
        dispatch.use(before)
    assert recording.size.rows == 16 and len(recording.tables.fills) == 2
    for i, (shape, (losses, gradient)) in enumerate(zip(SHAPES, found, strict=True)):
        expected, _ = forward_backward(decoder, bank, [forest(shape)], i, ledger)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert float((gradient - bank.gradient).norm()) <= 1e-5 * float(bank.gradient.norm())
