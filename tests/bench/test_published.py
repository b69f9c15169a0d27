"""The printed tables to their digits, the closed-form costs against sums written out here, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftdyno.bench import published as api
from peftdyno.bench.published import costs, render, tables
from peftdyno.bench.published.source import published

PAGE = Path(__file__).parents[2] / "docs" / "results" / "published-pscp.md"
TOKENS, LAYERS, HIDDEN, KV, MLP, VOCABULARY = 512, 32, 4096, 1024, 14336, 128256


@pytest.mark.parametrize("table", published().tables, ids=lambda t: str(t.exponents))
def test_printed_tables_to_the_printed_digits(table):
    assert len(table.pscp) == 6
    assert tables.reproduced(table) == table.pscp


def test_ten_tables_without_a_mismatch():
    assert len(published().tables) == 10
    assert tables.mismatches() == []
    assert tables.agreement() == "60 of 60"


def test_bitfit_rows():
    assert [table.pscp["bitfit"] for table in published().bitfit] == [58.38, 45.26]
    for table in published().bitfit:
        assert tables.reproduced(table) == table.pscp


def test_one_printed_figure_by_hand():
    # LoRA, all exponents 1: 80.1 / (1 + 14680064/5e8) / (1 + 0) / (1 + 27.75/94).
    assert round(80.1 / (1 + 14680064 / 5e8) / (1 + 27.75 / 94), 2) == published().tables[0].pscp["lora"]


def _forward(tokens: int, pairs: int) -> int:
    """Matrix FLOPs of Llama-3-8B summed layer by layer."""
    total = 0
    for _ in range(LAYERS):
        total += 2 * tokens * HIDDEN * HIDDEN  # query
        total += 2 * (2 * tokens * HIDDEN * KV)  # key and value
        total += 2 * tokens * HIDDEN * HIDDEN  # output
        total += 3 * (2 * tokens * HIDDEN * MLP)  # gate, up and down
        total += 2 * (2 * pairs * HIDDEN)  # scores, and their mix of the values: 32 heads of 128
    return total + 2 * tokens * HIDDEN * VOCABULARY


def test_base_flops():
    assert api.exact_flop("base", "full") == 7_822_209_187_840 == _forward(TOKENS, TOKENS**2)
    assert api.exact_flop("base", "causal") == _forward(TOKENS, sum(range(1, TOKENS + 1)))
    assert api.exact_tflop("base", "causal") == pytest.approx(7.75362, abs=5e-6)


def test_lora_flops():
    down_and_up = sum(2 * TOKENS * 16 * (i + o) for i, o in ((HIDDEN, KV), (HIDDEN, KV), (MLP, HIDDEN)))
    extra = api.exact_flop("lora", "full") - api.exact_flop("base", "full")
    assert extra == LAYERS * down_and_up
    assert extra / 1e12 == pytest.approx(0.01503, abs=5e-6)
    assert api.exact_flop("lora", "full", merged=True) == api.exact_flop("base", "full")


def test_soft_prompt_flops():
    assert api.exact_flop("prompt-tuning", "full") == _forward(612, 612**2)
    assert api.exact_tflop("prompt-tuning", "full") == pytest.approx(9.38207, abs=5e-6)
    assert api.exact_flop("prompt-tuning", "causal") == _forward(612, sum(range(1, 613)))
    assert api.exact_flop("p-tuning", "full", merged=True) == _forward(612, 612**2)
    mlp = 2 * 100 * (4096 * 768 + 768 * 768 + 768 * 4096)
    assert api.exact_flop("p-tuning", "full", encoder="MLP") == _forward(612, 612**2) + mlp


def test_prefix_flops():
    # Every query sees 32 more rows of keys and values.
    assert api.exact_flop("prefix-tuning", "full", merged=True) == _forward(TOKENS, TOKENS * (TOKENS + 32))
    projection = 2 * 32 * (1024 * 512 + 512 * 32 * 2 * 1024)
    causal = _forward(TOKENS, sum(range(33, 33 + TOKENS)))
    assert api.exact_flop("prefix-tuning", "causal") == causal + projection


def test_methods_that_cost_no_matrix_work():
    for method in ("ia3", "ln-tuning", "bitfit"):
        assert api.exact_flop(method, "full") == api.exact_flop("base", "full")
    assert costs.pointwise_flop("ia3") == LAYERS * TOKENS * (KV + KV + HIDDEN)
    assert costs.pointwise_flop("ia3", down_scaled_at="input") == LAYERS * TOKENS * (KV + KV + MLP)
    assert costs.pointwise_flop("ia3", merged=True) == 0
    assert costs.pointwise_flop("bitfit", merged=True) == LAYERS * TOKENS * (HIDDEN + KV)
    assert costs.extra_tflop("ln-tuning", "full") == 0


def test_prefill_and_decode():
    all_logits = 2 * TOKENS * HIDDEN * VOCABULARY
    prefill = api.exact_flop("base", "causal") - all_logits + 2 * HIDDEN * VOCABULARY
    assert api.exact_flop("base", "causal", phase="prefill") == prefill
    for method, rows in (("base", 0), ("prompt-tuning", 100), ("p-tuning", 100), ("prefix-tuning", 32)):
        assert api.exact_flop(method, "causal", phase="decode") == _forward(1, TOKENS + 1 + rows)
    assert api.exact_flop("lora", "causal", phase="decode") == _forward(1, TOKENS + 1) + 2 * 14_680_064


def test_trainable_parameters():
    for method in published().methods:
        assert api.trainable_parameters(method) == published().parameters[method]
    assert api.trainable_parameters("p-tuning", encoder="MLP") == 7_296_512
    assert api.trainable_parameters("ia3", down_scaled_at="input") == 524_288


@pytest.mark.parametrize("encoder", ["LSTM", "MLP"])
def test_p_tuning_parameters_against_torch_modules(encoder):
    nn = pytest.importorskip("torch").nn
    if encoder == "LSTM":
        head = [nn.Linear(1536, 1536, device="meta"), nn.Linear(1536, HIDDEN, device="meta")]
        parts = [nn.LSTM(HIDDEN, 768, num_layers=2, bidirectional=True, device="meta"), *head]
    else:
        parts = [nn.Linear(i, o, device="meta") for i, o in ((HIDDEN, 768), (768, 768), (768, HIDDEN))]
    count = 100 * HIDDEN + sum(p.numel() for part in parts for p in part.parameters())
    assert api.trainable_parameters("p-tuning", encoder=encoder) == count


def test_profiler_rule_gives_every_printed_figure():
    assert round(costs.profiler_count("base").total, 2) == published().base_tflop
    for method in published().methods:
        assert round(costs.profiler_count(method).total, 2) == published().inference_tflop[method], method


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown method 'lorra'.*lora"):
        api.exact_tflop("lorra", "full")
    with pytest.raises(ValueError, match="convention is 'half'"):
        api.exact_tflop("lora", "half")
    with pytest.raises(ValueError, match="phase is 'backward'"):
        api.exact_tflop("lora", "full", phase="backward")


def test_means_over_the_same_datasets():
    assert len(published().datasets) == 27
    means = {m: round(tables.mean_score(m), 2) for m in published().scores}
    assert means == {
        "base": 56.57,
        "ia3": 74.74,
        "prompt-tuning": 50.19,
        "prefix-tuning": 41.93,
        "p-tuning": 54.72,
        "lora": 77.94,
        "ln-tuning": 75.61,
    }
    for method in ("lora", "ln-tuning"):
        assert tables.omissions(method)[1] == [("apps",)]
    assert tables.omissions("ia3")[0] == [()]


def test_corrected_figure_by_hand():
    score = sum(published().scores["ia3"].values()) / 27
    expected = score / (1 + 196608 / 5e8) / (1 + 28.41 / 94)
    assert tables.corrected(merged=True)["ia3"] == pytest.approx(expected)


def test_p_tuning_with_the_mlp_encoder():
    printed = published().printed_inputs("p-tuning")
    assert round(tables.mlp_encoder(printed).pscp(), 2) == 31.91
    assert tables.steps("p-tuning", encoder="MLP")["printed"] == pytest.approx(31.91, abs=0.005)
    assert tables.mlp_encoder(printed).pscp() > tables.printed_pscp()["prompt-tuning"]


def test_merging_never_lowers_pscp():
    merged, unmerged = (tables.corrected(merged=m) for m in (True, False))
    assert all(merged[m] >= unmerged[m] for m in merged)
    assert merged["lora"] > unmerged["lora"]


def test_page_is_up_to_date(tmp_path):
    api.write_page(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text(), f"make it anew: {render.COMMAND}"
    assert render.COMMAND in PAGE.read_text()


def test_text_and_json():
    shown = api.text()
    assert "60.19" in shown and max(map(len, shown.splitlines())) <= 120
    data = json.loads(json.dumps(api.as_json(), allow_nan=False))
    assert len(data["tables"]) == 10 and data["mismatches"] == []
    assert data["base_flop"]["forward/full/merged"]["matrix_flop"] == 7_822_209_187_840
    assert set(data["methods"]) == set(published().methods)


def test_a_wrong_figure_would_be_seen(monkeypatch):
    table = published().tables[0]
    monkeypatch.setitem(table.pscp, "lora", 60.09)
    assert [(m, printed, ours) for _, m, printed, ours in tables.mismatches()] == [("lora", 60.09, 60.08)]
    assert "60.09 (ours 60.08)" in api.text()
