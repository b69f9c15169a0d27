"""What is predicted from shapes equals, as integers, what is counted while running, for every method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftdyno.engine.accounting.counting import Counter, UnknownOperator
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job, forward_pass, generation, run_step, training_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.generate import generate
from peftdyno.engine.optim import AdamW

from .small_jobs import EACH, QUICK, jobs, pack_of, real_model, sequences, under_every_policy


@EACH
@QUICK
@given(data=st.data())
def test_a_training_step(method: Method, data: st.DataObject) -> None:
    job = data.draw(jobs(method))
    share = data.draw(st.booleans())
    packs = [pack_of(job, data.draw(sequences(len(job.methods))), share_prefix=share) for _ in range(2)]
    for one in under_every_policy(job):
        decoder, bank = real_model(one)
        ledger = Ledger.of(decoder, bank)
        run_step(decoder, bank, AdamW.create(bank), packs, ledger)
        assert ledger.counter.tally.charges == training_step(one, packs).charges


@EACH
@QUICK
@given(data=st.data())
def test_a_forward_pass_and_a_generation(method: Method, data: st.DataObject) -> None:
    job = data.draw(jobs(method))
    prompts = data.draw(sequences(len(job.methods)))
    decoder, bank = real_model(job)
    pack, counter = pack_of(job, prompts, share_prefix=True), Counter(decoder.scope)
    with counter, torch.no_grad():
        with decoder.scope.within(owner="adapter"):
            bank.begin(0, training=False)
        decoder.logits(pack, bank)
    assert counter.tally.charges == forward_pass(job, pack).charges
    counter = Counter(decoder.scope)
    with counter:
        generate(decoder, bank, prompts, max_new_tokens=3, eos_ids=())
    assert counter.tally.charges == generation(job, prompts, 3).charges


def test_what_is_computed_again_costs_what_it_cost_first() -> None:
    """LoRA at the default places: `cheap` repeats pointwise work alone, `recompute` every product of every layer."""
    config = DecoderConfig(
        family="llama", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    job = Job(config=config, methods=(METHODS["lora"](),), dtype=torch.float32)
    keep, cheap, recompute = (
        training_step(one, [job.plain_pack(2, 16)]).by("phase", "owner", "layer") for one in under_every_policy(job)
    )
    for layer in range(3):
        for owner in ("base", "adapter"):
            again = recompute["recompute", owner, layer]
            assert again.matrix == keep["forward", owner, layer].matrix > 0
            assert ("recompute", owner, layer) not in keep
        assert cheap["recompute", "base", layer].matrix == 0
        assert 0 < cheap["recompute", "base", layer].pointwise < keep["forward", "base", layer].pointwise
    unchanged = [{k: v for k, v in found.items() if k[0] != "recompute"} for found in (keep, cheap, recompute)]
    assert unchanged[0] == unchanged[1] == unchanged[2]


def test_an_operator_without_a_formula_is_named() -> None:
    with pytest.raises(UnknownOperator, match=r"aten\.erfinv"), Counter(Scope()):
        torch.erfinv(torch.ones(2))
