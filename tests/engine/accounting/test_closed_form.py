"""The sums over layers and products equal what is counted, in both conventions; a third count is written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftdyno.bench.published import costs
from peftdyno.engine.accounting import closed_form, predict
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.accounting.tally import Tally
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.pack import Sequence

from .small_jobs import EACH, QUICK, jobs, pack_of, sequences, under_every_policy

LLAMA = builtin_config("llama-3-8b")


def matrices(tally: Tally) -> closed_form.Sums:
    """A tally's matrix FLOPs by phase, owner and layer."""
    sums = tally.by("phase", "owner", "layer").items()
    return {place: (c.matrix, c.matrix_full) for place, c in sums if (c.matrix, c.matrix_full) != (0, 0)}


@EACH
@QUICK
@given(data=st.data())
def test_equals_the_count(method: Method, data: st.DataObject) -> None:
    job = data.draw(jobs(method))
    share = data.draw(st.booleans())
    prompts = data.draw(sequences(len(job.methods)))
    packs = [pack_of(job, data.draw(sequences(len(job.methods))), share_prefix=share) for _ in range(2)]
    shapes = [PackShape.of(pack) for pack in packs]
    for one in under_every_policy(job):
        step = closed_form.training_step(job.config, job.methods, shapes, one.activations)
        assert step == matrices(predict.training_step(one, packs))
    logits = closed_form.forward_pass(job.config, job.methods, shapes[0])
    assert logits == matrices(predict.forward_pass(job, packs[0]))
    prompt_pack = PackShape.of(pack_of(job, prompts, share_prefix=True))
    lengths = [len(s.tokens) + (job.root.length if job.root else 0) for s in prompts]
    generated = closed_form.generation(job.config, job.methods, prompt_pack, lengths, 3)
    assert generated == matrices(predict.generation(job, prompts, 3))


def total(sums: closed_form.Sums) -> tuple[int, int]:
    return sum(causal for causal, _ in sums.values()), sum(full for _, full in sums.values())


def forward(method: Method) -> tuple[int, int]:
    """Causal and full-square matrix FLOPs of Llama-3-8B's logits at 1 x 512."""
    job = Job(config=LLAMA, methods=(method,))
    shape = PackShape.of(job.plain_pack(1, 512))
    return total(closed_form.forward_pass(LLAMA, (method,), shape))


def test_llama_written_out() -> None:
    """Every product of Llama-3-8B at 1 x 512, term by term."""
    projections = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 14336
    linear = 2 * 512 * 32 * projections
    head = 2 * 512 * 4096 * 128256
    square, triangle = 512 * 512, 512 * 513 // 2
    attention = [32 * 2 * 2 * pairs * 32 * 128 for pairs in (triangle, square)]
    assert forward(predict.Untuned()) == tuple(linear + head + pairs for pairs in attention)
    assert forward(predict.Untuned())[1] == 7_822_209_187_840
    assert round(forward(predict.Untuned())[0] / 1e12, 5) == 7.75362


def test_lora_written_out() -> None:
    adapters = 16 * (2 * (4096 + 1024) + (14336 + 4096))
    added = forward(METHODS["lora"]())[0] - forward(predict.Untuned())[0]
    assert added == 2 * 512 * 32 * adapters
    assert round(added / 1e12, 5) == 0.01503


PUBLISHED = {
    "lora": METHODS["lora"](),
    "ia3": METHODS["ia3"](),
    "bitfit": METHODS["bitfit"](),
    "ln-tuning": METHODS["ln-tuning"](),
    "prompt-tuning": METHODS["prompt-tuning"](num_virtual_tokens=100),
    "p-tuning": METHODS["p-tuning"](num_virtual_tokens=100),
    "prefix-tuning": METHODS["prefix-tuning"](num_virtual_tokens=32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_benchmark(name: str) -> None:
    """The closed forms of the published tables, which were derived apart from this code."""
    expected = [costs.exact_flop(name, convention) for convention in ("causal", "full")]
    assert list(forward(PUBLISHED[name])) == expected
    if name == "prompt-tuning":
        assert round(expected[1] / 1e12, 5) == 9.38207


def test_flop_counter_mode_on_an_eager_model() -> None:
    """PyTorch's counter on the eager transformers model, which has full-square attention."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    from peftdyno.engine.families import config_from_hf

    ours = config_from_hf(config.to_dict())
    model = transformers.LlamaForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 11, dtype=torch.int64))
    job = Job(config=ours, dtype=torch.float32)
    pack = job.plain_pack(2, 11)
    tables = counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
    counted = counter.get_total_flops() - sum(tables.values())  # angles as a product since torch 2.15
    assert counted == total(closed_form.forward_pass(ours, job.methods, PackShape.of(pack)))[1]
    assert counted == predict.forward_pass(job, pack).total().matrix_full


def test_a_shared_segment_counts_its_longest_sequence() -> None:
    """Full square of a prefix of 3 under sequences of 5 and 7: 3 * 7 + 2 * 5 + 4 * 7."""
    job = Job(config=LLAMA)
    pack = pack_of(
        job,
        [Sequence(tokens=(1, 2, 3, *range(10 * n, 11 * n)), num_prompt=1, ordinal=i) for i, n in enumerate((2, 4))],
        share_prefix=True,
    )
    causal, full = (x / (4 * 4096 * 32) for x in attention_only(job, pack))
    assert (causal, full) == (3 * 4 / 2 + (4 + 5) + (4 + 5 + 6 + 7), 3 * 7 + 2 * 5 + 4 * 7)


def attention_only(job: Job, pack: object) -> tuple[int, int]:
    sums = predict.forward_pass(job, pack).by("operator")[("attention",)]
    return sums.matrix, sums.matrix_full
