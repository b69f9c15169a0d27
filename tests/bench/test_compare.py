"""The side-by-side harness: turns, ratios, the check of equal work and the table."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from peftdyno.bench.compare import __main__ as command
from peftdyno.bench.compare import equal_work, products, quality
from peftdyno.bench.compare.equal_work import (
    LabelNoise,
    Trajectory,
    UnequalWork,
    check_exact_steps,
    check_steps,
    check_tokens,
)
from peftdyno.bench.compare.link import WorkerError
from peftdyno.bench.compare.memory import resident_peak, storage_bytes, traced_peak
from peftdyno.bench.compare.product_section import product_rows
from peftdyno.bench.compare.rows import in_order, text_batch, text_batches
from peftdyno.bench.compare.sides import check_compiled
from peftdyno.bench.compare.table import table
from peftdyno.bench.compare.turns import Row, in_turns, rates, row_from, timed
from peftdyno.bench.compare.worker import JOBS, job_class
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.weight_files import save_model
from peftdyno.engine.weights import random_weights
from peftdyno.kernels import cpu

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
SMALL = {
    "lora": LORA,
    "prompt-tuning": {"num_virtual_tokens": 5},
    "prefix-tuning": {"num_virtual_tokens": 4, "hidden_size": 16},
    "p-tuning": {"num_virtual_tokens": 4, "hidden_size": 16, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder that both sides read."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(folder, random_weights(CONFIG, torch.float32, seed=3), CONFIG)
    return str(folder)


def rows(count: int, seed: int = 0, prompt: int = 4) -> list[dict]:
    """Rows of several lengths that begin alike, so that padding and shared prefixes matter."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 16, (count,), generator=generator).tolist()
    tails = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [{"tokens": [5, 6, 7, *tail], "num_prompt": prompt} for tail in tails]


def test_turns_alternate_and_warm_ups_are_not_kept():
    order = []

    def side(name):
        def measure(turn):
            order.append((name, turn))
            return {"seconds": float(len(order)), "units": 1.0}

        return measure

    samples = in_turns({"a": side("a"), "b": side("b")}, repeats=2, warm_ups=1)
    assert order == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [s["seconds"] for s in samples["a"]] == [3, 5] and [s["seconds"] for s in samples["b"]] == [4, 6]


def test_timed_reads_the_clock_around_the_work():
    clock = iter([10.0, 12.5]).__next__
    sample = timed(lambda: 5, clock)
    assert sample == {"seconds": 2.5, "units": 5}
    assert rates([sample], per=3600) == [7200.0]


def row(**changes) -> Row:
    values = {
        "workload": "w",
        "against": "a",
        "unit": "steps/s",
        "ours": (8.0, 9.0, 40.0),
        "reference": (2.0, 3.0, 4.0),
    }
    return Row(**(values | changes))


def test_ratios_are_taken_pair_by_pair():
    assert row().ratios == (4.0, 3.0, 10.0) and row().result == 4.0
    assert row().met is None
    assert row(goal=4.0).met is True and row(goal=4.1).met is False
    assert row(goal=0.5, better="lower").met is False and row(goal=4.0, better="lower").met is True
    assert row(ours=(70.0,), reference=(), goal=60.0).met is True
    assert row(ours=(), reference=(), goal=60.0).met is None


def test_a_row_survives_its_record():
    check = check_steps(NEAR, REFERENCE, EXACT, NOISE)
    first = row(goal=4.0, note="n", check=check)
    assert row_from(json.loads(json.dumps(first.as_dict()))).as_dict()["ratio_median"] == 4.0
    assert table([row_from(json.loads(json.dumps(first.as_dict())))]) == table([first])


EXACT = Trajectory([3.0, 2.9, 2.8], [1.0, 1.1, 1.2])
REFERENCE = Trajectory([3.002, 2.903, 2.795], [1.01, 1.1, 1.21])
NEAR = Trajectory([2.999, 2.905, 2.806], [0.99, 1.11, 1.2])
NOISE = LabelNoise([1.0, 2.0, 3.0, 4.0], [1.001, 1.999, 3.001, 3.999])


def test_equal_work_is_judged_by_the_references_own_error():
    found = check_steps(NEAR, REFERENCE, EXACT, NOISE)
    assert found["loss_limits"] == pytest.approx([0.004, 0.006, 0.01])
    wide = LabelNoise([1.0, 2.0, 3.0, 4.0], [1.01, 1.99, 3.01, 3.99])
    chance = equal_work.SPREADS * 0.01 / 2
    assert check_steps(NEAR, REFERENCE, EXACT, wide)["loss_limits"] == pytest.approx([2 * chance] * 3)


def test_a_compiled_loop_that_does_other_steps_has_no_rate():
    check_compiled(NEAR, REFERENCE, EXACT, NOISE)
    other = Trajectory([3.002, 2.7, 2.6], REFERENCE.norms)
    with pytest.raises(WorkerError, match=r"its 3\.0020 2\.7000.*eager loop's 3\.00.*fp32's 3\.0000"):
        check_compiled(other, REFERENCE, EXACT, NOISE)


def noise_of(error: float, independent: int | None = None) -> LabelNoise:
    """Four labels that err by as much, two each way."""
    exact = [1.0, 2.0, 3.0, 4.0]
    return LabelNoise([a + (-1) ** i * error for i, a in enumerate(exact)], exact, independent)


def test_labels_that_share_their_errors_count_as_fewer():
    assert noise_of(0.01).standard_error() == pytest.approx(0.01 / 2)
    assert noise_of(0.01, independent=4).standard_error() == pytest.approx(0.01 / 2)
    assert noise_of(0.01, independent=1).standard_error() == pytest.approx(0.01)
    one, all_four = (check_steps(NEAR, REFERENCE, EXACT, noise_of(0.01, n))["loss_limits"] for n in (1, 4))
    assert one == pytest.approx([2 * limit for limit in all_four])


def test_chance_moves_the_norm_as_it_moves_the_loss():
    def limit(noise: LabelNoise, norms: list[float]) -> float:
        return check_steps(Trajectory(EXACT.losses, norms), REFERENCE, EXACT, noise)["norm_limits"][0]

    roundings = equal_work.GRADIENT_ROUNDINGS * equal_work.BF16_ROUNDING
    assert limit(noise_of(0.0), EXACT.norms) == pytest.approx(2 * 0.01 + roundings)
    relative = equal_work.SPREADS * (0.1 / 2) / min(EXACT.losses)
    assert limit(noise_of(0.1), EXACT.norms) == pytest.approx(2 * relative + roundings)
    assert limit(noise_of(0.1, independent=1), EXACT.norms) == pytest.approx(4 * relative + roundings)
    within = [norm * (1 + 2 * relative) for norm in EXACT.norms]
    limit(noise_of(0.1), within)
    with pytest.raises(UnequalWork, match="norm of step 1"):
        limit(noise_of(0.0), within)


@pytest.mark.parametrize(
    ("losses", "norms", "said"),
    [
        ([2.99, 2.9, 2.8], [1.0, 1.1, 1.2], "loss of step 1"),
        ([3.0, 2.9, 2.85], [1.0, 1.1, 1.2], "loss of step 3"),
        ([3.0, float("nan"), 2.8], [1.0, 1.1, 1.2], "loss of step 2"),
        ([3.0, 2.9, 2.8], [1.0, 1.2, 1.2], "norm of step 2"),
    ],
)
def test_unequal_work_is_refused_with_the_numbers(losses, norms, said):
    with pytest.raises(UnequalWork, match=f"{said}.*reference 3.002"):
        check_steps(Trajectory(losses, norms), REFERENCE, EXACT, NOISE)


def test_fp32_steps_may_differ_by_a_hundredth():
    found = check_exact_steps(Trajectory([3.0, 2.91, 2.8], [1.0, 1.1, 1.209]), EXACT)
    assert found["loss_errors"] == pytest.approx([0.0, 0.01, 0.0]) and found["norm_limits"] == [0.01] * 3
    for losses, norms, said in (
        ([3.0, 2.93, 2.8], EXACT.norms, "loss of step 2"),
        (EXACT.losses, [1.0, 1.1, 1.22], "norm of step 3"),
        (EXACT.losses, [1.0, float("nan"), 1.2], "norm of step 2"),
    ):
        with pytest.raises(UnequalWork, match=f"{said}.*ours.*fp32 3"):
            check_exact_steps(Trajectory(losses, norms), EXACT)


def test_greedy_tokens_may_part_at_near_ties_only():
    exact = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert check_tokens(exact, exact, exact)["identical"] == 2
    assert check_tokens([[1, 2, 3, 9], exact[1]], exact, exact)["lost"] == {"ours": 1, "reference": 0}
    assert check_tokens([[1, 9, 9, 9], exact[1]], [[1, 2, 9, 9], exact[1]], exact)["lost"]["ours"] == 3
    with pytest.raises(UnequalWork, match="2 of 8"):
        check_tokens([[1, 2, 9, 4], exact[1]], exact, exact)
    with pytest.raises(UnequalWork):
        check_tokens([[], []], exact, exact)


def compared(model: str, folder: Path, method: str = "lora", reference_model: str = "") -> dict:
    """The check of equal work as a section makes it, within this process."""
    options = SMALL.get(method, {})
    settings = {"batches": [rows(4), rows(4, seed=1)], "learning_rate": 2e-4}
    ours = job_class("ours.steps")(model=model, method=method, options=options, **settings)
    ours.save(str(folder))
    found, labels = {}, {}
    for dtype in ("bf16", "fp32"):
        plain = job_class("plain.steps")(model=reference_model or model, adapter=str(folder), dtype=dtype, **settings)
        labels[dtype] = plain.label_losses()
        found[dtype] = Trajectory(**plain.trajectory(3))
    noise = LabelNoise(labels["bf16"], labels["fp32"])
    return check_steps(Trajectory(**ours.trajectory(3)), found["bf16"], found["fp32"], noise)


@pytest.mark.parametrize("method", command.step_sections.IN_PEFT)
def test_a_step_of_every_method_equals_pefts(model, tmp_path, method):
    pytest.importorskip("peft")
    found = compared(model, tmp_path / "adapter", method)
    assert max(found["norms"]["ours"]) > 0 and found["losses"]["ours"][0] != found["losses"]["ours"][2]


@pytest.mark.parametrize("method", command.step_sections.IN_PEFT)
def test_in_fp32_steps_are_nearly_the_same(model, tmp_path, method):
    """Of bf16's values on both sides, whatever the file has."""
    pytest.importorskip("peft")
    settings = {"model": model, "batches": [rows(4), rows(4, seed=1)], "learning_rate": 2e-4}
    ours = job_class("ours.steps")(method=method, options=SMALL.get(method, {}), dtype="fp32", **settings)
    ours.save(str(tmp_path))
    plain = job_class("plain.steps")(adapter=str(tmp_path), dtype="fp32", **settings)
    found = check_exact_steps(*(Trajectory(**side.trajectory(3)) for side in (ours, plain)))
    assert max(found["norm_errors"]) < 1e-3


def test_a_perturbed_weight_is_no_equal_work(model, tmp_path):
    pytest.importorskip("peft")
    weights = random_weights(CONFIG, torch.float32, seed=3)
    weights.layers[1].down.mul_(1.5)
    save_model(tmp_path / "other", weights, CONFIG)
    with pytest.raises(UnequalWork):
        compared(model, tmp_path / "adapter", reference_model=str(tmp_path / "other"))


def test_a_perturbed_adapter_is_no_equal_work(model, tmp_path):
    """B starts at zero, so another A changes no loss of the first step: the gradient's norm tells."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    settings = {"batches": [rows(4)], "learning_rate": 2e-4, "model": model}
    ours = job_class("ours.steps")(method="lora", options=LORA, **settings)
    ours.save(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: 1.2 * tensor for name, tensor in load_file(path).items()}, path)
    sides = [job_class("plain.steps")(adapter=str(tmp_path), dtype=d, **settings) for d in ("bf16", "fp32")]
    noise = LabelNoise(*(side.label_losses() for side in sides))
    with pytest.raises(UnequalWork, match="norm of step 1"):
        check_steps(Trajectory(**ours.trajectory(1)), *(Trajectory(**s.trajectory(1)) for s in sides), noise)


OPTIM = {"learning_rate": 1e-3, "weight_decay": 1e-5, "warmup_ratio": 0.1, "max_grad_norm": 1.0}
TRAINING = {"batch": 3, "steps": 4, "optim": OPTIM}


def our_training(model: str, seeds: list[int], share: str):
    options = {"method": "lora", "options": LORA, "rows": rows(12), "share_prefix": share}
    return job_class("ours.training")(model=model, seeds=seeds, **options, **TRAINING)


@pytest.fixture(scope="module")
def trainers(model, tmp_path_factory) -> tuple[dict[str, Trajectory], LabelNoise]:
    """Four steps of HF Trainer from our adapter of seed 4, in bf16 and fp32, and what bf16 does to the labels."""
    pytest.importorskip("peft")
    folder = str(tmp_path_factory.mktemp("start") / "adapter")
    our_training(model, [4], "off").save([folder])
    batches = in_order(rows(12), 3, 4, 4)
    found, labels = {}, []
    for dtype in ("bf16", "fp32"):
        flat = [row for batch in batches for row in batch]
        trainer = job_class("trainer.training")(model=model, adapters=[folder], rows=[flat], dtype=dtype, **TRAINING)
        found[dtype] = Trajectory(**trainer.trajectory())
        plain = {"model": model, "adapter": folder, "batches": batches, "learning_rate": 1e-3}
        labels.append(job_class("plain.steps")(dtype=dtype, **plain).label_losses())
    return found, LabelNoise(*labels)


@pytest.mark.parametrize(("seeds", "share"), [([4], "off"), ([4], "on"), ([4, 5], "on")])
def test_training_equals_the_trainers(model, trainers, seeds, share):
    found, noise = trainers
    ours = our_training(model, seeds, share)
    check = check_steps(Trajectory(**ours.trajectory()), found["bf16"], found["fp32"], noise)
    assert check["steps"] == 4


def test_training_in_another_order_is_no_equal_work(model, trainers):
    found, noise = trainers
    ours = our_training(model, [5], "off")
    with pytest.raises(UnequalWork):
        check_steps(Trajectory(**ours.trajectory()), found["bf16"], found["fp32"], noise)


def test_generation_answers_alike(model, tmp_path):
    pytest.importorskip("peft")
    ours = job_class("ours.steps")(model=model, method="lora", options=LORA, batches=[rows(1)], learning_rate=1.0)
    ours.save(str(tmp_path))
    prompts = [row["tokens"] for row in rows(5)]
    settings = {"model": model, "adapter": str(tmp_path), "prompts": prompts, "max_new_tokens": 6, "unit": "tokens"}
    theirs = {
        d: job_class("transformers.generation")(eos_ids=[], batch=2, dtype=d, **settings) for d in ("bf16", "fp32")
    }
    mine = {d: job_class("ours.generation")(eos_ids=[], batch=3, dtype=d, **settings) for d in ("bf16", "fp32")}
    found = {name: side.tokens(6) for name, side in theirs.items()}
    # So small a model has near ties, which bf16 may decide either way; fp32 has none.
    assert check_tokens(mine["fp32"].tokens(6), found["bf16"], found["fp32"])["lost"]["ours"] == 0
    assert [len(tokens) for tokens in found["fp32"]] == [6] * 5 and mine["bf16"].measure()["units"] == 30
    ended = job_class("transformers.generation")(eos_ids=[found["bf16"][0][2]], batch=2, **settings)
    assert ended.tokens(6)[0] == found["bf16"][0][:2]


def test_every_job_has_its_class():
    assert all(isinstance(job_class(name), type) for name in JOBS if name != "trainer.training")


def test_text_is_cut_into_full_rows():
    batch = text_batch(4, 10, [{"tokens": list(range(13))}])
    assert [len(row["tokens"]) for row in batch] == [10] * 4
    assert batch[1]["tokens"] == [*range(10, 13), *range(7)]
    assert text_batches(2, 2, 10, [{"tokens": list(range(13))}]) == [batch[:2], batch[2:]]


def test_memory_is_measured():
    held = []
    sample = resident_peak(lambda: held.append(torch.ones(30_000_000)))
    held.clear()
    assert resident_peak(lambda: None)["peak_bytes"] < sample["peak_bytes"] - 60_000_000
    one = torch.zeros(100)
    assert storage_bytes([one, one[:50], torch.zeros(5)]) == 420


@pytest.mark.skipif(not cpu.AVAILABLE, reason="the C++ extension is not built")
def test_the_allocators_peak_is_recorded(model):
    assert 4_000_000 <= traced_peak(lambda: torch.ones(1_000_000)) < 4_100_000
    settings = {"method": "lora", "options": LORA, "batches": [rows(4)], "learning_rate": 1e-3}
    step = job_class("ours.steps")(model=model, **settings).allocated_peak()
    assert step["held"] > 0 and step["step"] > 0


def test_operators_and_their_products_are_seen(model):
    settings = {"model": model, "method": "lora", "options": LORA, "batches": [rows(4)], "learning_rate": 1e-3}
    job = job_class("ours.products")(**settings)
    with products.OperatorClock(itertools.count().__next__) as clock:
        job.take_step()
    seen = {name for name, operator in clock.operators.items() if operator.product_flops}
    assert "peftdyno::label_loss" in seen and any("linear" in name and "backward" in name for name in seen)
    assert not any("attention" in name for name in seen)
    tokens = sum(len(row["tokens"]) - 1 for row in rows(4))
    down = (tokens, CONFIG.intermediate_size, CONFIG.hidden_size)
    gate_up = (tokens, CONFIG.hidden_size, 2 * CONFIG.intermediate_size)
    assert gate_up in clock.shapes() and (down in clock.shapes() or CONFIG.num_hidden_layers == 1)
    rounds = job.profile(2)
    assert all(found["operators"].keys() == clock.operators.keys() for found in rounds)
    share, rate = product_rows(128, rounds)
    assert len(share.ours) == len(rate.ours) == 2
    assert min(*share.ours, *rate.ours) > 0 and "label_loss" in rate.note


def test_products_are_held_against_their_own_rounds_ceiling():
    def one(seconds, ideal):
        product = {"seconds": seconds, "calls": 1, "product_flops": 10, "ceiling_seconds": ideal}
        other = {"seconds": 1.0, "calls": 1, "product_flops": 0, "ceiling_seconds": 0.0}
        return {"step_seconds": seconds + 1.0, "operators": {"a": product, "b": other}}

    share, rate = product_rows(128, [one(1.0, 0.9), one(3.0, 2.4), one(1.0, 0.5)])
    assert share.ours == pytest.approx((50, 75, 50)) and rate.ours == pytest.approx((90, 80, 50))
    assert rate.result == pytest.approx(80) and "a 80%" in rate.note and "b" not in rate.note.split("; ")[1]


def test_the_ceiling_is_flops_over_seconds():
    ticks = itertools.count(0.0, products.CEILING_SECONDS)
    assert products.ceiling((2, 3, 4), clock=ticks.__next__) == pytest.approx(2 * 2 * 3 * 4 / products.CEILING_SECONDS)


class NoSides:
    environment: dict = {}  # noqa: RUF012

    def close(self) -> None:
        """Nothing to end."""


def test_a_failed_section_fails_the_command_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def unequal(_):
        raise UnequalWork("loss of step 1 is 9 from fp32's")

    monkeypatch.setattr(command, "open_sides", lambda *_: NoSides())
    monkeypatch.setattr(command, "SECTIONS", {"first": unequal, "second": lambda _: [row(goal=4.0)]})
    out = tmp_path / "compare.json"
    assert command.main(["--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED first: loss of step 1" in shown and "| 4x [3, 10] | ≥ 4x | yes |" in shown
    assert command.main(["--out", str(out), "--only", "second"]) == 1
    monkeypatch.setattr(command, "SECTIONS", {"first": lambda _: [row()], "second": lambda _: [row()]})
    assert command.main(["--out", str(out), "--only", "first"]) == 0


def test_an_unknown_section_is_named(capsys):
    assert command.main(["--only", "step-12"]) == 2
    assert "step-128" in capsys.readouterr().err


def test_the_table_says_what_is_missing():
    text = table([row(ours=(), reference=(), note="does not work here: no compiler")])
    assert "| - | - | - |" in text and "1. does not work here" in text


def test_the_quality_page_follows_from_its_runs():
    def one(seed, side, score, **more):
        return {"seed": seed, "side": side, "seconds": 3.0, "scores": {"corrected": {"f1": score}}, **more}

    alike = {"answered_alike": {"same": 7, "rows": 8}}
    runs = [
        one(1, "ours", 0.9),
        one(1, "reference", 0.8, **alike),
        one(2, "ours", 0.7),
        one(2, "reference", 0.8, **alike),
    ]
    found = {"metric": "f1", "untuned": {"corrected": {"f1": 0.25}}, "runs": runs}
    summary = quality.summary(found)
    assert summary["ours"]["mean"] == pytest.approx(0.8) and summary["difference"]["mean"] == pytest.approx(0.0)
    record = {
        **found, "summary": summary, "model": "m", "task": "sst2", "test_rows": 8, "note": "", "finished": "now",
        "command": "c", "versions": {}, "machine": {"processor": "p", "threads": 2}, "git": None,
        "training": {"steps": 3, "batch": 8, "learning_rate": 5e-4, "dropout": 0.05},
    }  # fmt: skip
    text = quality.page(record)
    assert "| 1 | 25.0 | 90.0 | 80.0 | +10.0 | 3 | 3 |" in text and "14 of 16" in text
