"""Memory predicted of a GPU against a step whose every allocation is followed, those inside Triton operators too.

The step runs on tensors without storage and launches no kernel; the code that allocates is the GPU's.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from peftdyno.engine.accounting.allocators import CachingAllocator, granted
from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.engine.accounting.gpu_scratch import TritonScratch, cublas_bytes, no_launches
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory_predict import training_memory
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack, Sequence, build_pack
from peftdyno.kernels import dispatch, triton, tuning

from .small_jobs import EACH

pytestmark = pytest.mark.skipif(not triton.installed(), reason="the code that launches kernels imports Triton")

CUDA = torch.device("cuda")
CONFIG = DecoderConfig(
    family="llama", vocab_size=4000, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip


class Opened(DispatchMode):
    """Follows what a GPU's allocator would hold, and runs operators down to their launches."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.tables = 0
        self.allocator = CachingAllocator()
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peftdyno" and func._opname in triton.OPERATORS:
            return self.operator(func._opname, args)
        options = kwargs or {}
        self.meet(args)
        if func is torch.ops.aten._to_copy.default and torch.device(options.get("device") or "meta").type == "cpu":
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        result = func(*args, **options)
        self.meet(result)
        return result

    def operator(self, name: str, args: Any) -> Any:
        """One call; what it leaves behind beside its results are tables, which prediction leaves out."""
        self.meet(args)
        before = set(self.seen)
        with self, no_launches():
            result = triton.load(name)(*args)
        returned = {t.untyped_storage()._cdata for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        for key in set(self.seen) - before - returned:
            self.tables += granted(self.seen[key]().nbytes())  # type: ignore[union-attr]
        return result

    def meet(self, values: Any) -> None:
        """Follow the storages that are not known yet."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.follow(tensor.untyped_storage())

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies."""
        key = storage._cdata
        if key in self.seen:
            return
        grant = self.allocator.grant(storage.nbytes())

        def lose(_: Any) -> None:
            self.live -= grant.nbytes
            self.allocator.release(grant)
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, lose)
        self.live += grant.nbytes
        self.peak = max(self.peak, self.live)


def rows(job: Job, count: int, length: int, labels: int) -> Pack:
    """`count` sequences, dealt out among the runs, whose last `labels` tokens are labelled."""
    sequences = [
        Sequence(tokens=tuple(range(length)), num_prompt=length - labels, run=i % len(job.methods), ordinal=i)
        for i in range(count)
    ]
    return build_pack(sequences, num_runs=len(job.methods), root=job.root)


def opened(job: Job, pack: Pack) -> Opened:
    """A first step after the making of model, bank and optimizer."""
    with dispatch.shapes_of(CUDA), Opened() as seen:
        decoder, bank = job.model(Scope())
        optimizer, best = AdamW.create(bank), bank.flat.clone()
        placed = pack.to(decoder.device)
        seen.peak = seen.live
        run_step(decoder, bank, optimizer, [placed], Ledger(Scope(), on=False))
    assert best.is_meta
    return seen


def agree(job: Job, pack: Pack) -> None:
    """Predicted and followed differ by the tables at most."""
    predicted = training_memory(job, [pack]).peak_bytes
    followed = opened(job, pack)
    missed = followed.peak + cublas_bytes() - predicted
    assert 0 <= missed <= followed.tables, (missed, followed.tables)


@EACH
@pytest.mark.parametrize("runs", [1, 2])
def test_every_method(method: Method, runs: int) -> None:
    job = Job(config=CONFIG, methods=(method,) * runs, device="cuda")
    agree(job, rows(job, 4, 50, 40))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["lora", "ia3", "full"])
@pytest.mark.parametrize(("count", "length", "labels"), [(2, 3, 1), (1, 300, 299), (8, 200, 2)])
def test_every_policy_and_shape(name: str, policy: Policy, count: int, length: int, labels: int) -> None:
    job = Job(config=CONFIG, methods=(METHODS[name](),), device="cuda", activations=policy)
    agree(job, rows(job, count, length, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bordered", [True, False])
def test_dtypes_and_borders(dtype: torch.dtype, bordered: bool) -> None:
    lora = METHODS["lora"](rank=4, dropout=0.1)  # type: ignore[call-arg]
    job = Job(config=CONFIG, methods=(lora,), dtype=dtype, device="cuda", bordered=bordered)
    agree(job, rows(job, 3, 60, 20))


@pytest.mark.parametrize("tokens", [4, 100])
def test_four_bit_weights(tokens: int) -> None:
    """With few tokens weights are dequantised on the way and never lie dense."""
    job = Job(config=CONFIG, methods=(METHODS["lora"](),), device="cuda", quant="nf4")
    agree(job, rows(job, 2, tokens // 2, 1))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "forms",
    [
        {"lora_linear": "plain", "lora_linear_backward": "plain"},
        {"lora_linear": "fused", "lora_linear_backward": "fused"},
        {"rms_norm_down": "together", "glu_down": "together"},
        {"lora_output_gradient": "together"},
    ],
    ids=str,
)
def test_forms_that_were_tuned(forms: dict[str, str], dropout: float) -> None:
    lora = METHODS["lora"](rank=16, dropout=dropout)  # type: ignore[call-arg]
    job = Job(config=CONFIG, methods=(lora,), device="cuda")
    with ExitStack() as stack:
        for operator, form in forms.items():
            stack.enter_context(tuning.trial_form(operator, form))
        agree(job, rows(job, 2, 64, 63))


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_of_several_megabytes(policy: Policy) -> None:
    """Where blocks may be larger than what was asked for."""
    config = replace(CONFIG, hidden_size=1024, intermediate_size=2816, vocab_size=9000, head_dim=64)
    job = Job(config=config, methods=(METHODS["lora"](),), device="cuda", activations=policy)
    agree(job, rows(job, 3, 401, 400))


def test_what_a_call_allocates_in_order() -> None:
    """dx of a product with a masked low-rank term: factors in 16 bits, du, and sums of dA and dB."""
    n, wide, out, rank = 64, 48, 80, 4
    scratch = TritonScratch()
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    arguments = [
        make(n, out), make(n, wide), make(n, rank), make(out, wide), [make(1, rank, wide, dtype=torch.float32)],
        [make(1, out, rank, dtype=torch.float32)], [1.0], [0, out], [0, n], 0.0, None, None, 0, True,
    ]  # fmt: skip
    events = scratch.of("lora_linear_backward", arguments)
    born = {event.storage: event.nbytes for event in events if event.nbytes is not None}
    died = {event.storage for event in events if event.nbytes is None}
    lasting = {event.result: event.nbytes for event in events if event.result >= 0}
    assert lasting == {0: 2 * n * wide, 1: 4 * rank * wide, 2: 4 * out * rank}
    assert died | {event.storage for event in events if event.result >= 0} == set(born)
    assert {2 * rank * wide, 2 * out * rank, 2 * n * rank} <= {born[storage] for storage in died}
    assert scratch.of("lora_linear_backward", arguments) is events


@pytest.mark.parametrize(
    ("config", "expected"), [(":4096:2:16:8", 8_519_680), (":16:8", 131_072), ("", 32 << 20), ("nonsense", 32 << 20)]
)
def test_the_library_keeps_what_it_was_told(config: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    assert cublas_bytes() == expected
