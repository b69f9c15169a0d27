"""Predicted peaks against what the allocator handed out, and the tracker's own figures."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.memory import MemoryTracker
from peftdyno.engine.accounting.memory_predict import follow_step, held, training_memory, validation_memory
from peftdyno.engine.accounting.predict import Job, run_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.optim import AdamW
from peftdyno.kernels import memory

from .small_jobs import EACH, QUICK, configs, real_model, under_every_policy

recorded = pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")


def measured_peak(job: Job, packs: list) -> int:
    """Bytes of all live tensors at the peak of a step: those that outlive it, the packs, and what the step adds."""
    decoder, bank = real_model(job)
    optimizer, best = AdamW.create(bank), bank.flat.clone()
    run_step(decoder, bank, optimizer, packs, Ledger(on=False))
    bank.state.clear()
    gc.collect()
    with memory.AllocatorPeak() as allocator:
        run_step(decoder, bank, optimizer, packs, Ledger(on=False))
    tracker = MemoryTracker(Scope(), "cpu", held(decoder, bank, optimizer, packs, [best]), 0)
    return sum(block.nbytes for block in tracker.log.blocks) + allocator.peak_bytes


def wide(config: DecoderConfig, **changes: object) -> DecoderConfig:
    """The flags of a config at sizes of real proportions, where fixed scratch is small beside activations."""
    fields = {**vars(config), "hidden_size": 64, "intermediate_size": 160, "vocab_size": 400, "head_dim": 16}
    return DecoderConfig(**{**fields, **changes})


@recorded
@EACH
@QUICK
@given(data=st.data())
def test_predicted_peak_is_within_a_hundredth(method: Method, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    job = Job(config=wide(data.draw(configs())), methods=(method,) * data.draw(st.integers(1, 2)), dtype=dtype)
    packs = [job.plain_pack(data.draw(st.integers(2, 4)), 96)]
    for one in under_every_policy(job):
        predicted = training_memory(one, packs, probe=True).peak_bytes
        assert predicted == pytest.approx(measured_peak(one, packs), rel=0.01), one.activations


@recorded
@pytest.mark.parametrize("name", ["lora", "prefix-tuning", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_takes_what_was_predicted(name: str, dtype: torch.dtype) -> None:
    config = DecoderConfig(
        family="llama", vocab_size=400, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    job = Job(config=config, methods=(METHODS[name](),) * 2, dtype=dtype)
    decoder, bank = real_model(job)
    optimizer, best = AdamW.create(bank), bank.flat.clone()
    pack = job.plain_pack(3, 200)
    for allocator in (memory.AllocatorPeak(), memory.AllocatorPeak()):  # the first call allocates tables
        bank.state.clear()
        with allocator:
            bank.begin(0, training=False)
            with torch.no_grad():
                decoder.losses(pack, bank)
    tracker = MemoryTracker(Scope(), "cpu", held(decoder, bank, optimizer, [pack], [best]), 0)
    measured = sum(block.nbytes for block in tracker.log.blocks) + allocator.peak_bytes
    assert validation_memory(job, pack, probe=True).peak_bytes == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["lora", "full", "prefix-tuning"])
def test_the_symbolic_step_holds_what_the_real_one_holds(name: str, policy: Policy) -> None:
    config = DecoderConfig(
        family="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    job = Job(config=config, methods=(METHODS[name](),), dtype=torch.float32, activations=policy)
    decoder, bank = real_model(job)
    packs = [job.plain_pack(2, 16)]
    real, symbolic = follow_step(decoder, bank, AdamW.create(bank), packs), training_memory(job, packs)
    assert real.by_category(real.peak_index) == symbolic.by_category(symbolic.peak_index)
    assert real.peak_bytes == symbolic.peak_bytes


def test_births_and_deaths() -> None:
    """Two tensors of 400 and 800 bytes, the first gone before the third of 1200 is born."""
    tracker = MemoryTracker(Scope(), "cpu", {}, 7)
    with tracker:
        first = torch.zeros(100)
        second = torch.zeros(200)
        del first
        third = torch.zeros(300)
    assert tracker.log.peak_bytes == second.nbytes + third.nbytes
    assert tracker.log.by_category(tracker.log.peak_index) == {"activations": 2000}
    assert tracker.log.curves() == {"activations": [400, 1200, 2000]}
