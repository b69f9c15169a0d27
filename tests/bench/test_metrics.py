"""Scores against hand-worked values, scikit-learn, scipy, and their own invariants, by both rules."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from peftdyno.bench.metrics import RULES, score, score_both
from peftdyno.bench.metrics.numbers import read_equation, result
from peftdyno.bench.tasks import TASKS
from peftdyno.engine.errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tasks.json").read_text())
SST2, CB, STSB, GSM8K, SVAMP = (TASKS[name] for name in ("sst2", "cb", "stsb", "gsm8k", "svamp"))
OPENBOOKQA, RECORD, CONALA = TASKS["openbookqa"], TASKS["record"], TASKS["conala"]


def labelled(labels: list[int]) -> list[dict]:
    return [{"sentence": "s", "premise": "p", "hypothesis": "h", "label": label} for label in labels]


def letters(answers: str) -> list[dict]:
    return [GOLDEN["openbookqa"]["row"] | {"answerKey": letter} for letter in answers]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_full(name: str, rule: str) -> None:
    task = TASKS[name]
    rows = [GOLDEN[name]["row"]]
    if task.labels:
        rows = labelled_like(name)
    if name == "stsb":
        rows = [rows[0] | {"label": value} for value in (1.0, 2.5, 3.8)]
    figures = score(task, [task.response(row) for row in rows], rows, rule)
    assert next(iter(figures)) == task.metric
    assert figures[task.metric] == pytest.approx(1.0)
    assert (figures["accuracy"], figures["invalid"]) == (1.0, 0.0)


def labelled_like(name: str) -> list[dict]:
    """A row of each label."""
    task, row = TASKS[name], GOLDEN[name]["row"]
    first = task.first_label
    values = task.labels if first is None else range(first, first + len(task.labels))
    return [row | {task.target: str(value) if isinstance(row[task.target], str) else value} for value in values]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TASKS)
def test_empty_answers_score_nothing_and_are_invalid(name: str, rule: str) -> None:
    figures = score(TASKS[name], [""], [GOLDEN[name]["row"]], rule)
    assert figures["accuracy"] == 0.0
    assert figures["invalid"] == (0.0 if TASKS[name].metric == "codebleu" else 1.0)
    bound = 0.25 if TASKS[name].metric == "codebleu" and rule == "published" else 0.0
    assert figures[TASKS[name].metric] == bound or math.isnan(figures["pearson"])


def test_answers_are_compared_without_case_space_and_thinking() -> None:
    rows = labelled([1, 0])
    predictions = ["<think>so negative</think>\n\n Positive \n", "NEGATIVE"]
    for figures in score_both(SST2, predictions, rows).values():
        assert figures == {"f1": 1.0, "accuracy": 1.0, "invalid": 0.0}
    assert score(SST2, ["positive.", "it is negative"], rows)["invalid"] == 1.0


def test_swap_in_multiclass_macro_f1() -> None:
    """Four classes, two right and two invalid: 0.5; published, both invalid ones become B: 0.375."""
    figures = score_both(OPENBOOKQA, ["x", "B", "C", "y"], letters("ABCD"))
    assert figures["corrected"]["macro_f1"] == 0.5
    assert figures["published"]["macro_f1"] == 0.375


def test_one_invalid_of_a_hundred() -> None:
    rows = labelled([0, 1] * 50)
    predictions = ["negative", "positive"] * 49 + ["hm", "positive"]
    corrected = score(SST2, predictions, rows)
    assert corrected["f1"] == 1.0 and corrected["invalid"] == 0.01
    assert score(SST2, predictions, rows, "published")["f1"] == pytest.approx(100 / 101)


def test_absent_class_stays_in_the_corrected_mean() -> None:
    figures = score_both(CB, ["entailment", "neutral"], labelled([0, 2]))
    assert figures["corrected"]["macro_f1"] == pytest.approx(2 / 3)
    assert figures["published"]["macro_f1"] == 1.0


def test_published_cuts_at_sixteen_characters() -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1}]
    for text, published in (("not_entailment of it", 0.0), ("not_entailment\0\0\0x", 1.0)):
        figures = score_both(TASKS["rte"], [text], rows)
        assert figures["corrected"]["f1"] == 0.0
        assert figures["published"]["f1"] == published


guess_lists = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(guess_lists)
def test_macro_f1_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    words = [*CB.labels, "nothing"]
    truth = [target for target, _ in pairs]
    figures = score_both(CB, [words[guess] for _, guess in pairs], labelled(truth))
    wanted = f1_score(truth, [guess for _, guess in pairs], labels=[0, 1, 2], average="macro", zero_division=0)
    assert figures["corrected"]["macro_f1"] == pytest.approx(wanted, abs=1e-12)
    swapped = [guess if guess < 3 else (0 if target == 1 else 1) for target, guess in pairs]
    published = f1_score(truth, swapped, average="macro", zero_division=0)
    assert figures["published"]["macro_f1"] == pytest.approx(published, abs=1e-12)
    hits = [guess == target for target, guess in pairs]
    assert figures["corrected"]["accuracy"] == pytest.approx(np.mean(hits))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=40))
def test_binary_f1_equals_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    words = [*SST2.labels, "nothing"]
    truth = [target for target, _ in pairs]
    figures = score_both(SST2, [words[guess] for _, guess in pairs], labelled(truth))
    one = f1_score([t == 1 for t in truth], [guess == 1 for _, guess in pairs], zero_division=0)
    assert figures["corrected"]["f1"] == pytest.approx(one, abs=1e-12)
    swapped = [guess if guess < 2 else 1 - target for target, guess in pairs]
    assert figures["published"]["f1"] == pytest.approx(f1_score(truth, swapped, zero_division=0), abs=1e-12)
    assert figures["corrected"]["f1"] >= figures["published"]["f1"] - 1e-12


@settings(max_examples=60, deadline=None)
@given(guess_lists, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(pairs: list[tuple[int, int]], random: object) -> None:
    words = [*CB.labels, "nothing"]
    shuffled = list(pairs)
    random.shuffle(shuffled)
    both = [
        score_both(CB, [words[guess] for _, guess in order], labelled([target for target, _ in order]))
        for order in (pairs, shuffled)
    ]
    assert both[0] == both[1]


def similarity(predictions: list[str], labels: list[float], rule: str = "corrected") -> dict[str, float]:
    return score(STSB, predictions, [{"sentence1": "", "sentence2": "", "label": label} for label in labels], rule)


def test_pearson_equals_scipy() -> None:
    labels, guesses = [0.5, 1.2, 3.8, 5.0], [1.0, 0.4, 3.9, 4.1]
    for rule, kind, bound in (("corrected", np.float64, 1e-12), ("published", np.float32, 1e-6)):
        wanted = pearsonr(np.array(labels, kind), np.array(guesses, kind))[0]
        got = similarity([str(guess) for guess in guesses], labels, rule)["pearson"]
        assert got == pytest.approx(wanted, abs=bound)


def test_unparsable_similarity() -> None:
    labels = [0.0, 1.0, 4.0, 5.0]
    predictions = ["0.0", "alike", "4.0", "5.0"]
    published = similarity(predictions, labels, "published")["pearson"]
    assert published == pytest.approx(pearsonr([0, -1, 4, 5], labels)[0], abs=1e-7)
    figures = similarity(predictions, labels)
    assert figures["pearson"] == pytest.approx(pearsonr([0, 3, 4, 5], labels)[0], abs=1e-12)
    assert figures["invalid"] == 0.25


@pytest.mark.parametrize(
    "predictions",
    [["2.0", "2.0", "2.0"], ["nan", "1.0", "2.0"], ["inf", "1.0", "2.0"]],
)
def test_degenerate_similarity(predictions: list[str]) -> None:
    assert math.isnan(similarity(predictions, [0.0, 1.0, 2.0], "published")["pearson"])
    assert math.isfinite(similarity(predictions, [0.0, 1.0, 2.0])["pearson"])


def test_similarity_without_spread_is_zero() -> None:
    assert similarity(["3.0", "3.0"], [1.0, 2.0])["pearson"] == 0.0
    assert similarity(["1.0", "2.0"], [3.0, 3.0])["pearson"] == 0.0
    assert similarity(["much", "less"], [1.0, 2.0])["pearson"] == 0.0
    assert similarity(["9" * 310, "1.0"], [1.0, 2.0])["pearson"] == 0.0


@pytest.mark.parametrize(
    ("text", "number", "published"),
    [
        ("#### 12", True, True),
        ("so 12\n#### 12.0", True, True),
        ("#### 1\n#### 12", True, True),
        ("#### $12", True, False),
        ("#### 12 eggs.", True, False),
        ("#### 12.", True, True),
        ("#### 12\nand so on", True, False),
        ("#### 12%", True, True),
        ("#### 13", False, False),
        ("#### 12/5", False, False),
        ("#### 12 or 13", False, False),
        ("#### -12", False, False),
        ("12", False, False),
        ("####", False, False),
        ("", False, False),
    ],
)
def test_final_number(text: str, number: bool, published: bool) -> None:
    rows = [{"question": "q", "answer": "<<3*4=12>>12\n#### 12"}]
    assert score(GSM8K, [text], rows)["final_number"] == number
    assert score(GSM8K, [text], rows, "published")["final_number"] == published


@pytest.mark.parametrize(
    ("text", "value"),
    [("#### 1,234.5", 1234.5), ("#### -$3", -3), ("#### $-3", -3), ("#### .5", 0.5), ("#### nan", None)],
)
def test_result_of_a_text(text: str, value: float | None) -> None:
    assert result(text) == value


@pytest.mark.parametrize(
    ("text", "right", "true"),
    [
        ("( 8.0 - 2.0 ) = 6.0", True, True),
        ("(8 - 2) = 6", True, True),
        ("( ( 4 - 1 ) * 2 ) = 6", True, True),
        ("( 1 + 1 ) = 2", False, True),
        ("( 8.0 - 2.0 ) = 5.0", False, False),
        ("8 - 2 = 6", False, False),
        ("( 8 ) - ( 2 ) = 6", False, False),
        ("( 6 / 0 ) = 6", False, False),
        ("( 2 ** 3 ) = 8", False, False),
        ("( __import__('os') ) = 6", False, False),
        ("( 3 + 3 ) = 6 = 6", False, False),
        ("( " + "(" * 900 + ") = 6", False, False),
        ("(" + "9*" * 2000 + "1) = 6", False, False),
        ("( True ) = 1", False, False),
        ("six", False, False),
    ],
)
def test_equation(text: str, right: bool, true: bool) -> None:
    rows = [GOLDEN["svamp"]["row"]]
    assert score(SVAMP, [text], rows)["equation"] == right
    assert score(SVAMP, [text], rows, "published")["equation"] == true


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-*/%()=. ", max_size=40))
def test_any_text_is_read_as_equation_or_refused(text: str) -> None:
    sides = read_equation(text)
    assert sides is None or all(isinstance(side, float) for side in sides)


def record_rows() -> list[dict]:
    row = GOLDEN["record"]["row"]
    return [row, row | {"answers": ["Bled"], "idx": {"passage": 0, "query": 1}}]


def test_record_takes_the_best_answer() -> None:
    figures = score_both(RECORD, ["the Amsel!", "Lake Bled"], record_rows())
    assert figures["corrected"]["answer_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["corrected"]["accuracy"] == 0.5
    assert figures["published"]["answer_f1"] == pytest.approx((1 + 1 + 2 / 3) / 3), "two answers, two rows"


def test_published_record_keeps_the_last_prediction_of_a_query() -> None:
    row = GOLDEN["record"]["row"]
    rows = [row | {"inputs": "i", "targets": answer} for answer in row["answers"]]
    figures = score_both(RECORD, ["Ruth Amsel", "Arden"], rows)
    assert figures["corrected"]["answer_f1"] == 0.5
    assert figures["published"]["answer_f1"] == 0.0


def test_exact_match() -> None:
    task, row = TASKS["gen-extract"], GOLDEN["gen-extract"]["row"]
    assert score(task, [row["answer"].upper()], [row])["exact_match"] == 1.0
    longer = row["answer"] + " and a long rest"
    assert score(task, [longer], [row])["exact_match"] == 0.0


def test_unequal_and_no_rows_are_errors() -> None:
    with pytest.raises(UserError, match="task 'sst2': 1 predictions for 2 rows"):
        score(SST2, ["positive"], labelled([0, 1]))
    with pytest.raises(UserError, match="no predictions"):
        score(SST2, [], [])
    with pytest.raises(UserError, match="unknown scoring rule 'correct'; did you mean corrected"):
        score(SST2, ["positive"], labelled([1]), "correct")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=60))
def test_any_prediction_can_be_scored(name: str, rule: str, text: str) -> None:
    figures = score(TASKS[name], [text], [GOLDEN[name]["row"]], rule)
    main = figures[TASKS[name].metric]
    assert 0.0 <= main <= 1.0 or (rule == "published" and math.isnan(main))
    assert 0.0 <= figures["invalid"] <= 1.0
