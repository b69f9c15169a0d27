"""CodeBLEU's parts against values worked by hand, and how the two rules put them together."""

import math
import time

import pytest

from peftdyno.bench.metrics import codebleu, score
from peftdyno.bench.metrics.dataflow import flows
from peftdyno.bench.tasks import TASKS

CODEALPACA = TASKS["codealpacapy"]


def only(reference: str, candidate: str, published: bool = False) -> dict[str, float | None]:
    return codebleu.parts([reference], [candidate], published)


def flow(code: str) -> list:
    tree = codebleu.parse(code)
    assert tree is not None
    return flows(tree)


def test_equal_programs_score_one() -> None:
    code = "def f(x):\n    y = x + 1\n    return y"
    assert only(code, code) == pytest.approx(dict.fromkeys(("ngram", "weighted_ngram", "syntax", "dataflow"), 1.0))


def test_ngram_by_hand() -> None:
    """Tokens a b c d e against a b c d f: precisions 4/5 3/4 2/3 1/2, lengths equal."""
    wanted = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert only("a b c d e", "a b c d f")["ngram"] == pytest.approx(wanted)


def test_brevity_and_smoothing_by_hand() -> None:
    """One matching token of four: precision 1/1, no longer n-grams (0.1 of 1 each), brevity exp(1 - 4)."""
    assert only("a b c d", "a")["ngram"] == pytest.approx(math.exp(-3) * 0.1**0.75)
    assert only("a b", "c d")["ngram"] == 0.0


def test_short_programs_can_be_right() -> None:
    """No three tokens in a row to compare: corrected leaves 3- and 4-grams out, published counts misses."""
    assert only("a b", "a b")["ngram"] == 1.0
    assert only("a b", "a b", published=True)["ngram"] == pytest.approx(0.1**0.5)
    texts = ["a b", "a b c d"]
    assert codebleu.parts(texts, texts)["weighted_ngram"] == pytest.approx(1.0)
    assert codebleu.parts(texts, texts, published=True)["weighted_ngram"] < 1.0


def test_keywords_weigh_five_times() -> None:
    """Reference `return x`: recall of `return` is 1 of 1.2, of the bigram 0 of 1 (as 0.1)."""
    weighted = only("return x", "return y")["weighted_ngram"]
    assert weighted == pytest.approx((1 / 1.2 * 0.1) ** 0.5)


def test_published_brevity_of_the_weighted_part() -> None:
    reference = "a b c d e f g h"
    ours, published = (only(reference, "a b c", rule)["weighted_ngram"] for rule in (False, True))
    assert ours == pytest.approx(published * math.exp(1 - 8 / 3))


def test_syntax_ignores_names_and_values() -> None:
    assert only("x = foo(1)", "y = bar('z')")["syntax"] == 1.0
    assert only("x = foo(1)", "y = 2 + 3")["syntax"] < 1.0


def test_syntax_matches_once_unless_published() -> None:
    """Reference: module, two assignments. The candidate has one: 1 of 3, or both assignments matched."""
    reference, candidate = "x = 1\ny = 2", "z = 3"
    assert only(reference, candidate)["syntax"] == pytest.approx(1 / 3)
    assert only(reference, candidate, published=True)["syntax"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("code", ["def f(:", "x = = 1", "(" * 5000, "\0", "1+" * 100_000 + "1"])
def test_code_that_does_not_parse(code: str) -> None:
    assert codebleu.parse(code) is None
    assert only("x = f(1)\ny = x", code)["syntax"] == 0.0
    assert only(code, "x = 1")["syntax"] is None


def test_dataflow_by_hand() -> None:
    """x comes from 1, y from x: the constant, both targets, and the use of x."""
    assert flow("x = 1\ny = x") == [
        ("var_0", "comesFrom", ()),
        ("var_1", "computedFrom", ("var_0",)),
        ("var_1", "comesFrom", ("var_1",)),
        ("var_2", "computedFrom", ("var_1",)),
    ]


def test_dataflow_survives_renaming() -> None:
    code = "total = 0\nfor item in values:\n    if item > total:\n        total += item\nprint(total)"
    other = code.replace("total", "best").replace("item", "v").replace("values", "numbers")
    assert flow(code) == flow(other)
    assert only(code, other)["dataflow"] == 1.0
    assert flow(code) != flow(code.replace("total += item", "total = 1"))


def test_branches_merge() -> None:
    """After the branch, x may come from either assignment."""
    code = "if c:\n    x = a\nelse:\n    x = b\ny = x"
    assert flow(code) != flow("x = a\ny = x")
    assert ("computedFrom" in {relation for _, relation, _ in flow(code)}) and len(flow(code)) == 6


def test_deep_loops_end() -> None:
    code = "".join(f"{' ' * depth}for x{depth} in y:\n" for depth in range(60)) + " " * 60 + "z = 1"
    start = time.monotonic()
    assert codebleu.parse(code) is not None
    assert time.monotonic() - start < 5


def test_missing_part_shares_its_weight() -> None:
    """`f()` has no data flow: corrected leaves it out, published counts it as 1."""
    row = {"prompt": "p", "response": "f()"}
    corrected = score(CODEALPACA, ["f()"], [row])
    assert "codebleu_dataflow" not in corrected
    parts = [corrected[f"codebleu_{name}"] for name in ("ngram", "weighted_ngram", "syntax")]
    assert corrected["codebleu"] == pytest.approx(sum(parts) / 3)
    published = score(CODEALPACA, ["f()"], [row], "published")
    published_parts = [published[f"codebleu_{name}"] for name in ("ngram", "weighted_ngram", "syntax")]
    assert published["codebleu"] == pytest.approx(sum(published_parts) / 4 + 0.25)


def test_case_matters_unless_published() -> None:
    row = {"prompt": "p", "response": "Value = Make ( Thing )"}
    assert score(CODEALPACA, ["value = make ( thing )"], [row])["codebleu"] < 1.0
    assert score(CODEALPACA, ["value = make ( thing )"], [row], "published")["codebleu"] == pytest.approx(1.0)


def test_nearest_of_several_answers_is_the_reference() -> None:
    row = {"question": "q", "starter_code": "", "solutions": '["print ( 1 )", "for x in y : pass"]'}
    assert score(TASKS["apps"], ["for x in y : pass"], [row])["codebleu"] == pytest.approx(1.0)
    assert score(TASKS["apps"], ["for x in y : pass"], [row], "published")["codebleu"] < 1.0


def test_nothing_is_run(tmp_path) -> None:
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').write('x')"
    score(CODEALPACA, [code], [{"prompt": "p", "response": code}])
    assert not trace.exists()
