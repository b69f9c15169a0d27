"""LoRA and its options: starts, gradients against PEFT's autograd, runs that differ, and bad settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.lora import LoRA
from peftdyno.engine.adapters.low_rank import principal_factors, row_norms
from peftdyno.engine.adapters.method import MODULES
from peftdyno.engine.builtin_configs import builtin_config
from peftdyno.engine.errors import UserError

from .banks import TinyModel, backward, pack_of, random_sequences, relative, shake, tiny_model, train_steps
from .peft_adapters import check_gradients, logits_of, peft_gradients, peft_logits, saved

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"rank_stabilised": True, "target_modules": ("q_proj", "o_proj", "gate_proj")},
    "patterns": {
        "rank_pattern": {"k_proj": 2, "layers.1.v_proj": 5},
        "alpha_pattern": {"down_proj": 3.5, "layers.0.v_proj": 1.0},
        "layers_to_transform": (0, 1),
    },
    "single modules": {"target_modules": ("layers.0.q_proj", "layers.2.down_proj", "up_proj")},
    "gaussian": {"init": "gaussian"},
    "all biases": {"bias": "all"},
    "lora_only biases": {"bias": "lora_only", "target_modules": ("q_proj", "v_proj")},
    "bias on B": {"lora_bias": True},
    "dora": {"dora": True, "target_modules": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")},
    "dora with biases": {"dora": True, "bias": "all", "target_modules": ("q_proj", "v_proj")},
    "pissa": {"init": "pissa"},
    "pissa rank-stabilised": {"init": "pissa", "rank_stabilised": True, "rank_pattern": {"v_proj": 2}},
    "pissa dora": {"init": "pissa", "dora": True},
    "random": {"init": "random"},
    "random dora": {"init": "random", "dora": True},
}


def lora(form: str, **more: Any) -> LoRA:
    return LoRA(**{"rank": 4, "alpha": 6.0, "dropout": 0.0, **FORMS[form], **more})


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Llama with a bias on every attention projection."""
    return tiny_model("llama-bias", tmp_path_factory.mktemp("biased"))


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("random")])
def test_starts_as_the_base_model(form: str, biased: TinyModel) -> None:
    expected = peft_logits(biased.hf)
    bank = biased.bank(lora(form, dropout=0.2))
    assert relative(logits_of(biased, bank), expected) <= 1e-6
    assert relative(logits_of(biased, shake(bank)), expected) > 1e-3


def test_without_a_factor_the_start_changes_no_bit(biased: TinyModel) -> None:
    empty = logits_of(biased, biased.bank(LoRA(layers_to_transform=(0,), target_modules=("q_proj",))))
    for form in ("plain", "dora"):
        assert torch.equal(logits_of(biased, biased.bank(lora(form, bias="none"))), empty)


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 14_680_064),
        ({"dora": True}, 14_680_064 + 32 * (1024 + 1024 + 4096)),
        ({"lora_bias": True}, 14_680_064 + 32 * (1024 + 1024 + 4096)),
        ({"target_modules": ("q_proj",), "rank_pattern": {"layers.3.q_proj": 8}}, 8192 * (31 * 16 + 8)),
        ({"target_modules": ("q_proj",), "layers_to_transform": (0, 31)}, 8192 * 2 * 16),
    ],
)
def test_counts(more: dict[str, Any], count: int) -> None:
    config = builtin_config("llama-3-8b")
    assert config is not None
    assert LoRA(**more).trainable_count(config) == count


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["biased", "gemma"])
def test_gradients_equal_peft(form: str, variant: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same adapter and batch: the loss and the gradient of every trained tensor."""
    model: TinyModel = request.getfixturevalue(variant)
    method = lora(form)
    bank = shake(model.bank(method))
    sequences = random_sequences([9, 6, 7])
    (loss,) = backward(model.decoder, bank, [pack_of(bank, sequences)])
    expected, gradients = peft_gradients(model, saved(model, bank, tmp_path), sequences)
    assert loss == pytest.approx(expected, rel=1e-5)
    names = method.peft_names(model.config, model.family)
    for name, shape in method.parameters(model.config).items():
        found = bank.parameters[name].grad[0]
        grad = gradients[names[name] + (".weight" if name.endswith(".magnitude") else "")]
        assert relative(found, grad[tuple(slice(n) for n in shape)]) <= 1e-4, name


@pytest.mark.parametrize("variant", ["llama-tied", "mistral", "qwen2-window", "qwen3", "gemma3-softcap"])
def test_gradients_equal_peft_in_every_family(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, tmp_path)
    method = lora("plain", target_modules=MODULES)
    check_gradients(
        model, shake(model.bank(method)), method.peft_names(model.config, model.family), tmp_path / "adapter"
    )


def test_edits_are_put_together_once_and_dropout_is_new_each_step(biased: TinyModel) -> None:
    bank = biased.bank(lora("plain", dropout=0.2))
    edits = []
    for step in (0, 1):
        bank.begin(step, training=True)
        edits.append(bank.linear(0, "qkv"))
    first, second = edits
    assert first.low_rank is second.low_rank and first.dropout == second.dropout == 0.2
    assert not torch.equal(first.keys, second.keys)
    bank.begin(1, training=False)
    still = bank.linear(0, "qkv")
    assert still.low_rank is first.low_rank and still.dropout == 0.0 and still.keys is None


def test_keys_of_a_step_are_made_and_copied_once(biased: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, made, plain = biased.bank(lora("plain", dropout=0.2), (1, 2)), [], AdapterBank.key_table
    monkeypatch.setattr(
        AdapterBank, "key_table", lambda self, streams: (made.append(self.step), plain(self, streams))[1]
    )
    for step in (3, 4):
        bank.begin(step, training=True)
        for layer in range(bank.config.num_hidden_layers):
            for site, modules in (("qkv", ("k_proj", "v_proj")), ("down", ("down_proj",))):
                expected = [bank.keys(f"dropout.{module}", layer) for module in modules]
                assert [bank.linear(layer, site).keys.tolist() for _ in range(2)] == [expected] * 2
    assert made == [3, 4]


@pytest.mark.parametrize("form", ["dora", "pissa"])
def test_edits_that_follow_from_the_parameters_are_new_each_step(form: str, biased: TinyModel) -> None:
    """DoRA's scales are the magnitudes over norms of the step; PiSSA's factors hold the trained ones."""
    found = []
    bank = biased.bank(lora(form))
    for step in (0, 1):
        shake(bank)
        bank.begin(step, training=True)
        edits = bank.linear(0, "qkv")
        found.append(edits.scales[0].values if form == "dora" else edits.low_rank[0].b)
    assert not torch.equal(*found)


def test_bordered_products_have_room_for_every_factor(biased: TinyModel) -> None:
    """A PiSSA start doubles the rank that acts."""
    for form, ranks in (("plain", 4), ("pissa", 8)):
        bank = biased.bank(lora(form), (0, 1))
        bank.bordered = frozenset({(1, "qkv"), (1, "o")})
        bank.begin(0, training=True)
        edits = bank.linear(1, "qkv")
        assert edits is not None
        assert bank.spare(1, "qkv") == 2 * sum(term.a.shape[1] for term in edits.low_rank) == 2 * 2 * ranks
        assert bank.spare(1, "o") == 0


MIXED = (
    {"rank": 2, "alpha": 3.0},
    {"rank": 5, "rank_stabilised": True, "rank_pattern": {"layers.1.k_proj": 3}, "init": "gaussian"},
    {"rank": 3, "init": "pissa", "target_modules": ("k_proj", "q_proj")},
    {"layers_to_transform": (1,), "target_modules": ("v_proj",), "alpha_pattern": {"v_proj": 2.0}},
)


def test_runs_of_other_shapes_together_equal_each_alone(biased: TinyModel) -> None:
    """Ranks, scalings, starts and targets of their own, dropout on; padding stays zero."""
    methods = [LoRA(**{"rank": 4, "dropout": 0.2, **more}) for more in MIXED]
    check_together(biased, methods)


@pytest.mark.parametrize("form", ["all biases", "bias on B", "dora with biases", "pissa dora"])
def test_runs_with_options_together_equal_each_alone(form: str, biased: TinyModel) -> None:
    check_together(biased, [lora(form, dropout=0.2), lora(form, dropout=0.2, rank=2, alpha=9.0)])


def check_together(model: TinyModel, methods: list[LoRA]) -> None:
    seeds, rates = range(3, 3 + len(methods)), [1e-3 * (j + 1) for j in range(len(methods))]

    def batches(seed: int, run: int) -> list[list[Any]]:
        return [[random_sequences(n, run=run, seed=10 * seed + i)] for i, n in enumerate([(6, 4), (5,), (3, 7)])]

    apart = [batches(seed, run) for run, seed in enumerate(seeds)]
    joined = [[[s for one in step for s in one[0]]] for step in zip(*apart, strict=True)]
    together = shake(model.bank(methods, seeds))
    train_steps(model.decoder, together, joined, rates)
    for run, (method, seed) in enumerate(zip(methods, seeds, strict=True)):
        alone = shake(model.bank([method], [seed]))
        start = alone.flat.clone()
        train_steps(model.decoder, alone, batches(seed, 0), rates[run : run + 1])
        own, expected = together.run_tensors(run), alone.run_tensors(0)
        assert relative(*(torch.cat([bank[name].flatten() for name in expected]) for bank in (own, expected))) <= 1e-5
        assert relative(alone.flat, start) > 1e-3
        used = sum(int(t.count_nonzero()) for t in own.values())
        assert int(together.flat[run].count_nonzero()) == used


@pytest.mark.parametrize("runs", [1, 2])
def test_b_learns_at_its_own_rate(biased: TinyModel, runs: int) -> None:
    """LoRA+: a first AdamW step moves every value by its rate, B by 16 times that of A."""
    from peftdyno.engine.optim import AdamW, OptimConfig

    bank = shake(biased.bank([lora("plain", b_rate_factor=16.0)] * runs, range(runs)))
    before = bank.flat.clone()
    sequences = [sequence for run in range(runs) for sequence in random_sequences([8, 8], run=run)]
    backward(biased.decoder, bank, [pack_of(bank, sequences)])
    config = OptimConfig(learning_rate=1e-4, weight_decay=0.0)
    AdamW.create(bank).step(bank, [config] * runs, [1e-4] * runs, [1.0] * runs, [True] * runs)
    moved = AdapterBank.empty(biased.config, bank.methods, bank.seeds)
    moved.flat.copy_((bank.flat - before).abs())
    for name, tensor in moved.parameters.items():
        expected = 16e-4 if name.endswith(".B") else 1e-4
        assert float(tensor.detach().median()) == pytest.approx(expected, rel=0.01), name


def test_starts_have_the_spread_that_peft_gives_them(biased: TinyModel) -> None:
    wide = {"rank": 32, "target_modules": ("up_proj",), "dropout": 0.0}
    tensors = {init: biased.bank(LoRA(init=init, **wide)).run_tensors(0) for init in ("kaiming", "gaussian", "random")}
    a, b = "layers.0.up_proj.A", "layers.0.up_proj.B"
    bound = 64**-0.5
    assert tensors["kaiming"][a].abs().max() <= bound and tensors["kaiming"][a].std() > 0.5 * bound
    assert float(tensors["gaussian"][a].std()) == pytest.approx(1 / 32, rel=0.1)
    assert not tensors["kaiming"][b].any() and not tensors["gaussian"][b].any()
    assert 0.5 * 32**-0.5 < tensors["random"][b].std() < 32**-0.5


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    out=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 5), runs=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_row_norms_and_principal_factors(out: int, columns: int, rank: int, runs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((out, columns), (runs, rank, columns), (runs, out, rank))
    )
    scaling = torch.linspace(0.5, 2.0, runs, dtype=torch.float64)
    found = row_norms(weight, weight.square().sum(1), a, b, scaling)
    assert torch.allclose(found, (weight + scaling[:, None, None] * (b @ a)).norm(dim=2))
    smaller = min(rank, out, columns)
    a0, b0 = principal_factors(weight, [(smaller, 0.5), (1, 2.0)])
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    for run, (r, scale) in enumerate([(smaller, 0.5), (1, 2.0)]):
        assert torch.allclose(scale * (b0 @ a0)[run], (u[:, :r] * s[:r]) @ vt[:r])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_modules": ("q_porj",)}, r"lora\.target_modules entry 'q_porj'; did you mean q_proj"),
        ({"rank_pattern": {"layers.1.k": 2}}, r"lora\.rank_pattern entry 'layers\.1\.k'"),
        ({"rank": 0}, r"lora\.rank 0"),
        ({"rank_pattern": {"k_proj": 0}}, r"rank_pattern \{'k_proj': 0\}"),
        ({"alpha": 0.0}, r"lora\.alpha 0\.0.*must be positive"),
        ({"alpha_pattern": {"k_proj": -1.0}}, r"alpha_pattern \{'k_proj': -1\.0\}: must be positive"),
        ({"alpha_pattern": {"k_proj": float("nan")}}, r"must be positive"),
        ({"dropout": 1.0}, r"lora\.dropout 1\.0 must be in \[0, 1\)"),
        ({"init": "pizza"}, r"lora\.init 'pizza'; did you mean pissa"),
        ({"bias": "some"}, r"lora\.bias 'some'"),
        ({"b_rate_factor": 0.0}, r"lora\.b_rate_factor 0\.0"),
        ({"dora": True, "lora_bias": True}, r"lora\.lora_bias cannot be combined with lora\.dora"),
    ],
)
def test_bad_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"target_modules": ("layers.9.q_proj",)}, r"target 'layers\.9\.q_proj' names no module"),
        ({"target_modules": ()}, r"targets \(none\) name no module"),
        ({"rank_pattern": {"o_proj": 2}}, r"lora\.rank_pattern entry 'o_proj' is none of the adapted modules"),
        ({"layers_to_transform": (0, 3)}, r"layers_to_transform has 3; the model's layers are 0 to 2"),
        ({"init": "pissa", "rank": 40}, r"lora\.rank 40 .*k_proj"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_named(setting: dict[str, Any], message: str, biased: TinyModel) -> None:
    with pytest.raises(UserError, match=message):
        biased.bank(LoRA(**setting))


def test_runs_that_a_bank_cannot_hold_are_refused(biased: TinyModel) -> None:
    for form, one, other in (("plain", {"dropout": 0.1}, {}), ("dora", {"target_modules": ("v_proj",)}, {})):
        field = next(iter(one))
        with pytest.raises(UserError, match=rf"runs of one bank differ in lora\.{field}"):
            biased.bank([lora(form, **one), lora(form, **other)], (0, 1))
