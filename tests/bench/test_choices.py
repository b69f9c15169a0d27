"""What stands behind the decisions: every subject on a tiny model, the table, the record, the command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from peftdyno.bench.compare.choices import __main__ as command
from peftdyno.bench.compare.choices import decoding, lines, memory_ways, products, steps
from peftdyno.bench.compare.choices.setting import Setting, Sizes
from peftdyno.bench.compare.choices.subjects import SUBJECTS, Subject
from peftdyno.bench.compare.record import Results
from peftdyno.bench.compare.turns import timed
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.generate import generate
from peftdyno.engine.panels import packed_weights
from peftdyno.engine.sources import resolve_config

REPEATS = 2
SIZES = Sizes(
    batch=2,
    length=8,
    few_rows=3,
    copies=2,
    decode_steps=2,
    layers=1,
    way_batch=4,
    way_lengths=(6, 4),
    stream_bytes=1 << 16,
    noise_batches=3,
    task_batches=2,
)


@pytest.fixture
def setting(tiny_model) -> Setting:
    """Random texts for the tiny model."""
    tokens = torch.randint(3, 300, (8, 12)).tolist()
    texts = [{"tokens": row, "num_prompt": 9} for row in tokens]
    return Setting(model=str(tiny_model), texts=texts, prompts=tokens, repeats=REPEATS, sizes=SIZES)


PRODUCTS = [
    *(
        name
        for site in SITES
        for name in (
            *(f"{direction}_{site}_{rows}" for rows in (8, 16) for direction in ("forward", "dx")),
            f"few_{site}",
        )
    ),
    "forward_head",
    "dx_head",
    "new_library",
    "new_operator",
]
EXPECTED = {
    "products": PRODUCTS,
    "step": ["step"],
    "overhead": ["step"],
    "tokens": ["step", "token", "pack"],
    "hastened": ["shared", "repeated", "labelled", "long"],
    "stream": ["rate"],
    "memory-ways": ["length_6", "length_4"],
    "four-bit": [
        f"{site}_{kind}_{dtype}"
        for site in ("gate_up", "head")
        for kind in ("nf4", "nf4-double")
        for dtype in ("bf16", "fp32")
    ],
    "noise": ["label", "batch", "sequences", "labels"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_subject_has_its_lines(name, setting):
    if name == "noise":
        pytest.importorskip("transformers")
    plain = json.loads(json.dumps(asdict(setting)))
    found = json.loads(json.dumps(Subject(name, plain).measure()))
    assert list(found) == EXPECTED[name]
    shown = lines.table(found).splitlines()
    assert len(shown[2 : 2 + len(found)]) == len(found)
    for line, row in zip(found.values(), shown[2:], strict=False):
        assert row.startswith(f"| {line['what']} | {line['unit']} | ")
        rounds = {len(cell["values"]) for cell in line["cells"].values()}
        batches = len(setting.texts) // SIZES.batch
        assert rounds == ({batches} if line["unit"] == "tokens" else {1} if name == "noise" else {REPEATS})
        assert all(value >= 0 for cell in line["cells"].values() for value in cell["values"])


def test_all_subjects_are_tested():
    assert {*EXPECTED, "decode"} == SUBJECTS.keys()


def test_a_decoding_step_is_the_sum_of_its_parts(setting):
    found = {line.name: line for line in SUBJECTS["decode"](setting)}
    with packed_weights(decoding.Decoding(setting).decoder, "on") as held:
        sides = ("no panels", "panels") if held else ("no panels",)
    assert ("make" in found) == ("size" in found) == bool(held)
    for side in sides:
        parts = [found[part.replace(" ", "_")].cells[side] for part in decoding.PARTS]
        assert [sum(values) for values in zip(*parts, strict=True)] == pytest.approx(found["step"].cells[side])
        assert min(found["attention"].cells[side]) > 0 and min(found["products"].cells[side]) > 0
    assert min(found["floor"].cells["no panels"]) > 0


def test_every_second_pass_is_clocked(setting):
    watching = decoding.Decoding(setting)
    watched = decoding.Watched(watching.decoder.config, watching.decoder.weights)
    plain = generate(watching.decoder, watching.bank, watching.prompts, max_new_tokens=5, eos_ids=())
    assert generate(watched, watching.bank, watching.prompts, max_new_tokens=5, eos_ids=()) == plain
    assert len(watched.begins) == 5 and len(watched.clocks) == 2
    first, second = watched.plain_seconds()
    assert (first, second) == (watched.begins[2] - watched.begins[1], watched.begins[4] - watched.begins[3])


def test_two_sides_do_not_read_the_same_weight_one_after_the_other():
    left, weights = torch.ones(2, 4), [torch.full((3, 4), float(i)) for i in range(4)]
    seen: list[tuple[str, float]] = []

    def product(name):
        return lambda x, weight: seen.append((name, weight[0, 0].item())) or x

    measures = {
        "library": products._measure(product("library"), left, weights),
        "operator": products._measure(product("operator"), left, weights, later=True),
    }
    samples = [measures[name](turn) for turn in range(5) for name in measures]
    assert [n for name, n in seen if name == "library"] == [0, 1, 2, 3, 0]
    assert [n for name, n in seen if name == "operator"] == [2, 3, 0, 1, 2]
    assert {sample["units"] for sample in samples} == {2 * 2 * 3 * 4}


def test_rounds_are_sums_of_calls():
    clock = iter([0.0, 1.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0]).__next__
    samples = [timed(lambda: 2e9, clock) for _ in range(4)]
    assert lines.giga(lines.rounds(samples, 2)) == pytest.approx((4 / 3, 4 / 7))
    assert lines.milliseconds(lines.rounds(samples, 4)) == pytest.approx((1e3 * 10 / 8e9,))


def test_ratios_are_formed_round_by_round():
    line = lines.Line(
        name="n", what="w", unit="ms", cells={"a": (2.0, 9.0, 8.0), "b": (1.0, 3.0, 8.0)}, over=(("a", "b"),)
    )
    assert line.ratios() == {"a / b": (2.0, 3.0, 1.0)}
    record = line.record()
    assert record["ratios"]["a / b"] == {"median": 2.0, "least": 1.0, "most": 3.0, "values": [2.0, 3.0, 1.0]}
    other = lines.Line(name="m", what="v", unit="s", cells={"b": (5.0,)}, note="alone").record()
    assert lines.table({"n": record, "m": other}).splitlines() == [
        "| what | unit | a | b | a / b |",
        "| --- | --- | --- | --- | --- |",
        "| w | ms | 8 [2, 9] | 3 [1, 8] | 2x [1, 3] |",
        "| v | s | - | 5 | - |",
        "",
        "v: alone",
    ]


def test_ways_halve_the_micro_batch():
    assert [str(way) for way in memory_ways.ways(8)] == [
        "keep 8", "cheap 8", "recompute 8", "keep 4", "keep 2", "keep 1",
    ]  # fmt: skip


def test_a_token_costs_its_share_of_the_step(setting):
    step, token, _ = steps.tokens(setting)
    assert step.cells.keys() == token.cells.keys() == {"8 tokens", "16 tokens"}
    assert token.cells["16 tokens"] == pytest.approx([value / 16 for value in step.cells["16 tokens"]])


def test_a_shared_prefix_is_counted_once(setting):
    texts = [{"tokens": [7, 8, 9, 20 + i, 5], "num_prompt": 3} for i in range(4)]
    pack = steps._pack_line(replace(setting, texts=texts))
    assert pack.cells == {"prefix shared": (5.0, 5.0), "prefix repeated": (8.0, 8.0)}


def test_only_the_last_token_of_a_sequence_is_labelled():
    (row,) = steps._last_labelled([{"tokens": [4, 5, 6], "num_prompt": 1}])
    assert row == {"tokens": [4, 5, 6], "num_prompt": 2}


def test_the_narrow_model_keeps_its_layers(tiny_model):
    config = resolve_config(tiny_model)
    found = steps.narrow(config)
    assert found.num_hidden_layers == config.num_hidden_layers and found.family == config.family
    assert found.hidden_size == found.intermediate_size == steps.NARROW


def test_means_of_independent_errors_shrink_with_their_number(setting):
    pytest.importorskip("transformers")
    found = {line.name: line.cells for line in SUBJECTS["noise"](setting)}
    for side in ("transformers", "ours"):
        label = found["label"][side][0]
        assert 0 < label < 0.1
        assert found["sequences"][side][0] == pytest.approx(label / math.sqrt(SIZES.batch))
        assert found["labels"][side][0] == pytest.approx(label / math.sqrt(3 * SIZES.batch))


def test_the_command_keeps_its_record(tiny_model, tmp_path, capsys):
    out = tmp_path / "choices.json"
    words = ["--model", str(tiny_model), "--repeats", "1", "--threads", "1", "--out", str(out)]
    assert command.main([*words, "overhead"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("## overhead\n") and "| lora | lora-no-dropout | bitfit | ln-tuning |" in shown
    record = json.loads(out.read_text())["sections"]["overhead"]
    assert {"command", "versions", "machine", "git", "finished", "settings", "seconds"} <= record.keys()
    assert "peftdyno.bench.compare.choices" in record["command"] and record["machine"]["threads"] == 1
    assert record["lines"]["step"]["cells"]["lora"]["median"] > 0
    assert command.main([*words, "--show"]) == 0
    assert capsys.readouterr().out == shown


def test_a_failed_subject_fails_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measured", lambda *_: ({}, "step: RuntimeError: no memory"))
    words = ["--model", str(tiny_model), "--out", str(tmp_path / "choices.json")]
    assert command.main([*words, "step"]) == 1
    assert "FAILED step: step: RuntimeError: no memory" in capsys.readouterr().out
    assert Results(tmp_path / "choices.json").errors(["step"]) == {"step": "step: RuntimeError: no memory"}


def test_an_unknown_name_lists_the_names(capsys):
    assert command.main(["stpe"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "'stpe'" in told and all(name in told for name in SUBJECTS)
